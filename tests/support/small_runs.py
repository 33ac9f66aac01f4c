"""Training runs of seconds on tiny random models that are saved in folders."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from sparsegrad_cli.errors import InterruptedRunError
from sparsegrad_cli.progress import Observer
from sparsegrad_cli.recipe.load_recipe import digest, load_recipe
from sparsegrad_cli.records.store import RunWriter
from sparsegrad_cli.run.folder import prepare_folder
from sparsegrad_cli.run.open_run import Run
from sparsegrad_cli.training.fine_tuning import fine_tune
from support.tiny_models import build, config

ROWS = 24  # of validation
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def base_folder(folder: Path, architecture: str = "bert", **overrides: Any) -> Path:
    """Save a random body with a byte tokenizer; BERT as a masked model, without a pooler."""
    from transformers import AutoModel, AutoModelForMaskedLM

    tokenizer = byte_tokenizer()
    # With transformers' default of 0.02, the logits of a tiny model are close to zero.
    settings = config(architecture, vocab_size=len(tokenizer), initializer_range=0.3, **overrides)
    loader = AutoModelForMaskedLM if architecture == "bert" else AutoModel
    model: Any = build(loader, settings, seed=3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def byte_tokenizer() -> Any:
    """Return a tokenizer with one token per byte and a pad token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "</s>": 1, **{letter: i + 2 for i, letter in enumerate(letters)}}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
    )


def end_texts(base: Path) -> Path:
    """Let the tokenizer of a folder end every text with ``</s>``: an empty text has a token."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    end = [("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("$A </s>", None, end)
    tokenizer.save_pretrained(base)
    return base


def sentences(seed: int, count: int) -> list[tuple[str, str]]:
    """Return (text, label); the label says in which half of the alphabet the first letter is."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(3, 12, (), generator=draw))
        numbers = torch.randint(26, (length,), generator=draw).tolist()
        text = "".join(_LETTERS[n] for n in numbers)
        rows.append((text, "low" if numbers[0] < 13 else "high"))
    return rows


def data_folder(folder: Path) -> Path:
    """Write train.csv and validation.csv of a task with two labels."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, seed, count in (("train", 1, 48), ("validation", 2, ROWS)):
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerows([("text", "label"), *sentences(seed, count)])
    return folder


def train(
    run: Path, base: Path, data: Path, *overrides: str, stop: bool = False, resume: bool = False
) -> Path:
    """Train for six steps as `sparsegrad train` does, without the report, which takes long.

    Args:
        data: a folder of classes, or a file of conversations.
        overrides: overrides as on the command line.
        stop: leave the run as Ctrl-C after the last step does, with checkpoints and no adapter.
        resume: resume the run in the folder.
    """
    classes = ("task=csv", "task.max_length=16", "calibration.warmup_steps=0")
    task = classes if data.is_dir() else ("task=chat",)  # without a new head to warm
    settings = (
        f"model={base}",
        *task,
        f"task.path={data}",
        "train.per_device_train_batch_size=8",
        "train.learning_rate=3e-2",
        "train.max_steps=6",
        "train.eval_strategy=steps",
        "train.eval_steps=3",
        "train.load_best_model_at_end=false",
        "calibration.steps=3",
        "calibration.source=batch",
        "calibration.decomposition=exact",
        "train.use_cpu=true",
        f"output_dir={run}",
    )
    loaded = load_recipe(None, (*settings, *overrides))
    prepare_folder(run, loaded.recipe, resume=resume, overwrite=False)
    kept = RunWriter(
        run,
        command="train",
        name=run.name,
        recipe_digest=digest(loaded.recipe),
        seed=loaded.recipe.seed,
    )
    fine_tune(Run(loaded, kept, Observer(), resume=resume))
    if stop:
        shutil.rmtree(run / "adapter")
    kept.finish(InterruptedRunError("stopped") if stop else None)
    return run


def record(run: Path) -> dict[str, Any]:
    """Return run.json."""
    found: dict[str, Any] = json.loads((run / "run.json").read_text(encoding="utf-8"))
    return found


@torch.no_grad()
def answers(model: nn.Module, tokenizer: Any) -> tuple[Tensor, float]:
    """Return logits (rows, 2) of the validation data and their mean cross-entropy."""
    rows = sentences(2, ROWS)
    labels = torch.tensor([["high", "low"].index(label) for _, label in rows])
    inputs = tokenizer(
        [text for text, _ in rows],
        padding=True,
        truncation=True,
        max_length=16,
        return_tensors="pt",
    )
    logits: Tensor = model.eval()(**inputs).logits
    return logits, float(nn.functional.cross_entropy(logits.float(), labels))


def base_of(run: Path) -> str:
    """Return the folder of the run's base model."""
    name: str = yaml.safe_load((run / "recipe.yaml").read_text())["model"]["name"]
    return name


def by_transformers(folder: Path | str, **settings: Any) -> nn.Module:
    """Load a sequence classifier with transformers."""
    from transformers import AutoModelForSequenceClassification

    model: nn.Module = AutoModelForSequenceClassification.from_pretrained(folder, **settings)
    return model


def by_peft(run: Path, folder: Path) -> nn.Module:
    """Load a LoRA folder with peft, on the run's base model with a new head."""
    from peft import PeftModel

    base: Any = by_transformers(base_of(run), num_labels=2, pad_token_id=0)
    model: nn.Module = PeftModel.from_pretrained(base, str(folder))
    return model


def tokenizer_of(run: Path) -> Any:
    """Return the tokenizer of the run's base model."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base_of(run))
