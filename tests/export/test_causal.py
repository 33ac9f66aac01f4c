"""Exports of language models that were trained on conversations.

As in test_forms.py, the exported files must give the validation loss that the run recorded.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.chat_tokenizers import byte_level
from support.small_runs import base_of, record, train
from support.tiny_models import build, config
from torch import Tensor, nn

import sparsegrad_cli
from sparsegrad_cli.progress import Observer
from sparsegrad_cli.recipe.load_recipe import load_recipe
from sparsegrad_cli.restore.restore import load_trained
from sparsegrad_cli.restore.run_files import open_run
from sparsegrad_cli.tasks.setup import first_validation_batches, make_setup

Exported = Callable[..., tuple[Path, dict[str, Any]]]

pytestmark = pytest.mark.usefixtures("warm_python")
QUESTIONS = ("Is 12 more than 7?", "And 7?", "Who came home?", "What was old?", "Nobody?")
ANSWERS = ("It is, by 5.", "No: they are equal.", "The children were asleep.", "The ship.")
CASES = {
    "core": (("method.form=core", "method.rank=6"), "llama"),
    "core-rest": (("method.form=core", "method.rank=6", "scope=rest"), "gpt2"),
    "lora-rest": (("method=lora", "method.rank=2", "scope=rest"), "llama"),
    "meprop-rest": (("method=meprop", "method.density=0.05", "scope=rest"), "llama"),
    "packed": (("method.form=rotated", "task.chat.packing=pack"), "llama"),
}


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``talks("method=lora", architecture="llama")``: a run on conversations."""
    from transformers import AutoModelForCausalLM

    place = tmp_path_factory.mktemp("talks")
    rows = [{"prompt": f"{n}. {QUESTIONS[n % 5]}", "completion": ANSWERS[n % 4]} for n in range(40)]
    data = place / "talk.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    count = 0

    def run(*overrides: str, architecture: str) -> Path:
        nonlocal count
        count += 1
        base = place / f"{architecture}-{count}"
        tokenizer = byte_level()
        room = {"n_positions": 96} if architecture == "gpt2" else {"max_position_embeddings": 96}
        shape = {"vocab_size": len(tokenizer), "initializer_range": 0.3, **room}
        settings = config(architecture, tie_word_embeddings=True, **shape)
        model: Any = build(AutoModelForCausalLM, settings, seed=3)
        model.generation_config.max_new_tokens = 9
        model.save_pretrained(base)
        tokenizer.save_pretrained(base)
        limits = ("task.max_length=96", "task.validation_fraction=0.25")
        return train(place / f"run-{count}", base, data, *limits, *overrides)

    return run


def test_run_that_dropped_conversations_can_be_exported(
    talks: Callable[..., Path], tmp_path: Path
) -> None:
    """Make data whose first conversations in each split are too long to train on."""
    run = talks("method=lora", "train.max_steps=1", architecture="llama")
    path = Path(load_recipe(run / "recipe.yaml").recipe.task.path or "")
    rows = path.read_text(encoding="utf-8")
    long = json.dumps({"prompt": "x" * 200, "completion": "y"}) + "\n"
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text(long * 40 + rows, encoding="utf-8")
    found = load_trained(
        open_run(run, (f"task.path={tmp_path}", "task.validation_fraction=0.1")), 3
    )
    assert len(next(iter(found.setup.validation.values()))) == 3


def held_out(run: Path) -> list[dict[str, Tensor]]:
    setup = make_setup(load_recipe(run / "recipe.yaml"), Observer())
    return first_validation_batches(setup, 1000, 4)


@torch.no_grad()
def loss_of(model: Any, batches: list[dict[str, Tensor]]) -> float:
    """Compute the loss per labelled token by its definition."""
    total = count = 0.0
    for batch in batches:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        said = model.eval()(**inputs).logits[:, :-1].float().log_softmax(-1)
        labels = batch["labels"][:, 1:]
        learnt = labels != -100
        total -= float(said[learnt].gather(1, labels[learnt][:, None]).sum())
        count += int(learnt.sum())
    return total / count


def by_transformers(folder: Path | str, **settings: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, **settings)
    return model


def by_peft(run: Path, folder: Path) -> nn.Module:
    from peft import PeftModel

    base: Any = by_transformers(base_of(run))
    model: nn.Module = PeftModel.from_pretrained(base, str(folder))
    return model


def greedy(model: Any, tokenizer: Any, stop: Any) -> list[int]:
    chat = [{"role": "user", "content": "3. What was old?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    ids = ids["input_ids"] if not isinstance(ids, Tensor) else ids
    mask = torch.ones_like(ids)
    said = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=9,
        pad_token_id=0,
        eos_token_id=stop,
    )
    return [int(token) for token in said[0]]


# One of each form is enough for every day: a case trains and exports three times.
_LONG = ("packed", "lora-rest", "meprop-rest")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in _LONG else n for n in CASES]
)
def test_every_form_gives_the_recorded_validation_loss(
    name: str, talks: Callable[..., Path], exported: Exported
) -> None:
    from transformers import AutoTokenizer

    overrides, architecture = CASES[name]
    run = talks(*overrides, architecture=architecture)
    rank = () if name.startswith(("core", "lora")) else ("--rank", "16")
    merged, said = exported(run, "merged")
    assert said["model"]["auto_class"] == "AutoModelForCausalLM"
    assert said["check"]["answers"] > said["check"]["examples"], "an answer a token"
    lora, about = exported(run, "lora", *rank)
    own, _ = exported(run, "adapter", "--tolerance", "0")
    models: list[Any] = [
        by_transformers(merged),
        by_peft(run, lora),
        sparsegrad_cli.load_adapter(own),
    ]
    if name.startswith("lora"):  # the run's own is a PEFT folder already
        models.append(by_peft(run, run / "adapter"))
    batches = held_out(run)
    trained = record(run)["metrics"]["final"]["loss"]
    assert abs(loss_of(by_transformers(base_of(run)), batches) - trained) > 0.05
    tokenizer = AutoTokenizer.from_pretrained(merged)
    stop = models[0].generation_config.eos_token_id  # a base model alone ends no turn
    said_first = greedy(models[0], tokenizer, stop)
    for model in models:
        assert loss_of(model, batches) == pytest.approx(trained, abs=5e-5)
        assert greedy(model, tokenizer, stop) == said_first
    # What makes it talk goes along, and tied weights stay tied, or are carried at both ends.
    plain: Any = models[0]
    assert tokenizer.chat_template and plain.generation_config.max_new_tokens == 9
    assert plain.get_input_embeddings().weight is plain.get_output_embeddings().weight
    assert "lm_head.weight" not in load_file(merged / "model.safetensors")
    ends = {m for m in about["modules"] if m.endswith(("lm_head", "embed_tokens", "wte"))}
    assert len(ends) == (2 if "scope=rest" in overrides else 0)


@pytest.mark.parametrize("method", [("method=full",), ("method.form=core", "method.rank=6")])
def test_float32_parameters_of_a_half_precision_model_are_exported(
    method: tuple[str, ...], talks: Callable[..., Path], exported: Exported
) -> None:
    """Trained weights are float32 and are rounded to the dtype of the base model."""
    mixed = ("model.dtype=bfloat16", "train.bf16=true", "scope=rest", *method)
    run = talks(*mixed, architecture="llama")
    trained = load_file(run / "adapter" / "adapter.safetensors")
    assert trained["model.norm.weight"].dtype == torch.float32
    merged, said = exported(run, "merged")
    assert said["dtype"] == "bfloat16" and 1e-4 < said["rounding"] < 0.5
    plain = by_transformers(merged)
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    exported(run, "lora", *(("--rank", "16") if "full" in method[0] else ()))
    _, exact = exported(run, "adapter", "--tolerance", "0")
    assert exact["check"]["difference"] == 0.0
    loss = record(run)["metrics"]["final"]["loss"]
    assert loss_of(plain, held_out(run)) == pytest.approx(loss, rel=0.03)
