"""Run every PEFT type on small models, and write docs/reference/peft-types.md.

    python -m benchmarks.peft_types              the page, to standard output
    python -m benchmarks.peft_types vera dora    only these rows

Each row is measured: a run of a few steps on a BERT, a LLaMA and a GPT-2 of one block with random
weights; an adapter loaded into a fresh model; a run cut in two; merged weights in a plain model.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

from sparsegrad_cli.errors import SparsegradError, UsageError
from sparsegrad_cli.io.atomic import read_tensors, save_tensors
from sparsegrad_cli.methods.base import TargetShapes
from sparsegrad_cli.methods.implementation import TrainingData, load_by_name, trainable_state
from sparsegrad_cli.methods.registry import settings_class, spelled_out
from sparsegrad_cli.models.targets import Target, find_targets
from sparsegrad_cli.numerics.seeding import temporary_seed
from sparsegrad_cli.recipe.schema import TargetsSection, TrainSection

HIDDEN, INNER, VOCABULARY = 32, 64, 67
_SIDES = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": INNER}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "BERT": ("bert", {"hidden_size": HIDDEN, **_SIDES}),
    "LLaMA": ("llama", {"hidden_size": HIDDEN, **_SIDES}),
    "GPT-2": ("gpt2", {"n_embd": HIDDEN, "n_layer": 1, "n_head": 2, "n_inner": INNER}),
}
# Sizes for such small layers; other types run with PEFT's own.
SMALL: dict[str, dict[str, Any]] = {
    "adamss": {"r": 8, "num_subspaces": 2},
    "fourierft": {"n_frequency": 20},
    "hira": {"r": 4},
    "lily": {"r": 4},
    "miss": {"r": 4},
    "oft": {"oft_block_size": 4},
    "peanut": {"r": 4},
    "psoft": {"r": 4},
    "randlora": {"r": 4},
    "shira": {"r": 2},
    "supertuning": {"sparsity": 0.9},
    "vblora": {"num_vectors": 8, "r": 2},
    "waveft": {"n_frequency": 20},
}
# The MLPs of builtin:minilm, on which the trainable parameters are counted.
MINILM = [
    Target(f"layer.{block}.{kind}", kind, block, *shape, False)
    for block in range(6)
    for kind, shape in (("up", (1536, 384)), ("down", (384, 1536)))
]
_INTRODUCTION = """# PEFT types

Written by `python -m benchmarks.peft_types`, with peft {peft}, transformers {transformers} and
torch {torch}. How to use them:
[docs/how-to/compare-peft-methods.md](../how-to/compare-peft-methods.md).

- **Runs on**: models of one block on which a run of a few steps lowers the loss.
- **Trainable**: parameters in the MLPs of `builtin:minilm` (7,077,888 weights) with the type's
  defaults, and the key that a budget solves.
- **Starts as base**: the largest difference of logits from the base model before the first step.
- **Reloads**, **resumes**: logits of a saved adapter in a fresh model, and parameters of a run
  that was cut in two, are bit for bit the same.
- **Merges**: the largest difference of logits of a plain model that holds the merged weights.
- **LoRA**: the exact rank of the factors for r = 4; "converts" where PEFT can convert the type
  with its `convert_to_lora`. Others are exported by truncation (`--rank`).
"""


def batch(seed: int, size: int = 8) -> dict[str, Tensor]:
    """Return (size, 6) token ids, and labels that depend on the first token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (size, 6), generator=generator)
    labels = (ids[:, 0] > VOCABULARY // 2).long()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def plain(architecture: str) -> Any:
    """Return a classifier with random weights, in eval mode."""
    kind, sides = MODELS[architecture]
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=VOCABULARY, pad_token_id=0, num_labels=2, **sides
    )
    with temporary_seed(0):
        made = transformers.AutoModelForSequenceClassification.from_config(config)
    return made.eval()


def logits(model: Any) -> Tensor:
    """Return the logits of one batch, in eval mode."""
    model.eval()
    with torch.no_grad():
        found: Tensor = model(**batch(7)).logits
    return found


class Tuned:
    """A small model with PEFT's layers, and its optimizer."""

    def __init__(self, name: str, architecture: str, *, data: bool = True) -> None:
        self.model = plain(architecture)
        self.targets = find_targets(self.model, TargetsSection())
        self.method: Any = settings_of(name).implementation()
        training = TrainingData(20, self._batches, self._loss) if data else None
        with temporary_seed(0):
            self.method.prepare(self.model, self.targets, scope="head", training=training)
        self.optimizer = self.method.optimizer(self.model, TrainSection(learning_rate=5e-3))

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        return (batch(100 + number, 4) for number in range(3))

    def _loss(self, inputs: Mapping[str, Tensor]) -> Tensor:
        loss: Tensor = self.model(**inputs).loss
        return loss

    def steps(self, seeds: list[int]) -> list[float]:
        """Take a step on the batch of each seed; return the losses before them."""
        self.model.train()
        losses = []
        for seed in seeds:
            self.optimizer.zero_grad()
            loss = self._loss(batch(seed))
            loss.backward()
            self.optimizer.step()
            losses.append(float(loss.detach()))
        return losses


def settings_of(name: str) -> Any:
    """Return the settings of a type or variant for small layers."""
    keys = {**spelled_out(name), **SMALL.get(name, {})}
    if keys.get("type") == "LORA":
        keys["r"] = 4
    elif keys["name"] == "lora":
        keys["rank"] = 4
    found = settings_class(keys)
    assert found is not None
    return found.model_validate(keys)


@dataclass
class Row:
    """What was measured of a type; texts of the table's cells."""

    runs: list[str]
    start: float = 0.0
    reloads: bool = True
    resumes: bool = True
    merges: str = ""
    lora: str = ""


def measure(name: str) -> Row:
    """Run a type on all models."""
    row = Row([])
    for architecture in MODELS:
        try:
            tuned = Tuned(name, architecture)
        except SparsegradError:
            continue
        row.start = max(row.start, _difference(logits(tuned.model), logits(plain(architecture))))
        losses = tuned.steps([3] * 25)
        if losses[-1] < losses[0]:
            row.runs.append(architecture)
        row.reloads &= _reloads(tuned, name, architecture)
        row.resumes &= _resumes(name, architecture)
        row.merges = _worse(row.merges, _merged(tuned, architecture))
        row.lora = _lora(tuned)
    return row


def _difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def _reloads(tuned: Tuned, name: str, architecture: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        save_tensors(path, tuned.method.adapter_tensors(tuned.model), {})
        fresh = Tuned(name, architecture, data=False)
        fresh.method.load_adapter(fresh.model, read_tensors(path))
    return torch.equal(logits(fresh.model), logits(tuned.model))


def _resumes(name: str, architecture: str) -> bool:
    """Return whether four steps are the same when they are cut in two."""
    with temporary_seed(4):
        whole = Tuned(name, architecture)
        whole.steps([0, 1, 2, 3])
    with temporary_seed(4):
        first = Tuned(name, architecture)
        first.steps([0, 1])
        state, held = trainable_state(first.model), first.optimizer.state_dict()
        random = torch.get_rng_state()
    with temporary_seed(9):
        second = Tuned(name, architecture)
        load_by_name(second.model, state)
        second.optimizer.load_state_dict(held)
        torch.set_rng_state(random)
        second.steps([2, 3])
    both = zip(whole.model.parameters(), second.model.parameters(), strict=True)
    return all(torch.equal(one, other) for one, other in both)


def _merged(tuned: Tuned, architecture: str) -> str:
    """Return the difference of a plain model with merged weights, or why there is none."""
    model = plain(architecture)
    names = {name for name, _ in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in tuned.model.named_parameters():
            if name in names and parameter.requires_grad:
                model.get_parameter(name).copy_(parameter)
        try:
            for target in tuned.targets:
                weight_OI = target.weight_OI(model)
                weight_OI.copy_(tuned.method.merged_OI(tuned.model, target))
                bias = tuned.method.merged_bias(tuned.model, target)
                if bias is not None:
                    model.get_parameter(f"{target.name}.bias").copy_(bias)
        except UsageError:
            return f"not on {architecture}"
    return f"{_difference(logits(model), logits(tuned.model)):.0e}"


def _worse(one: str, other: str) -> str:
    """Return the cell that says less: a refusal, then the larger difference."""
    refused = [cell for cell in (one, other) if cell.startswith("not")]
    if refused:
        return ", ".join(dict.fromkeys(refused))
    return max((cell for cell in (one, other) if cell), key=float)


def _lora(tuned: Tuned) -> str:
    factors = tuned.method.factors(tuned.model, tuned.targets[0])
    if factors is not None:
        return f"exact, rank {factors.rank}"
    layer: Any = tuned.model.get_submodule(tuned.targets[0].name)
    return "converts" if layer.supports_lora_conversion() else "–"


def line(name: str) -> str:
    """Return the table's line of a type or variant."""
    row, settings = measure(name), settings_class(name)
    assert settings is not None
    found: Any = settings.model_validate(spelled_out(name))
    sizing = found.sizing(TargetShapes(MINILM))
    size = getattr(getattr(found, "tuner", None), "size", None)
    key = "–" if size is None else f"`{size.key}`"
    cells = (
        f"`{name}`",
        ", ".join(row.runs) or "–",
        f"{sizing.trainable:,}",
        key,
        "yes" if row.start == 0 else f"{row.start:.0e}",
        "yes" if row.reloads else "**no**",
        "yes" if row.resumes else "**no**",
        row.merges,
        row.lora,
    )
    return f"| {' | '.join(cells)} |"


def page(names: list[str]) -> Iterator[str]:
    """Yield the lines of the page."""
    from sparsegrad_cli.methods.peft_types.tuner_facts import RUNNING, TUNERS, VARIANTS

    versions = {each.__name__: each.__version__ for each in (peft, transformers, torch)}
    yield _INTRODUCTION.format(**versions)
    columns = ("runs on", "trainable", "size key", "starts as base", "reloads", "resumes", "merges")
    header = f"| method | {' | '.join(columns)} | LoRA |"
    types = [name.lower() for name in RUNNING if name != "LORA"]
    variants = [name for name in VARIANTS if name != "rslora"]
    for title, rows in (("Types", types), ("Variants of LoRA", variants)):
        yield f"## {title}\n\n{header}\n|{' :-- |' * 9}"
        for name in rows:
            if not names or name in names:
                yield line(name)
        yield ""
    yield "`LORA` itself is the method `lora`, and `rslora` is `{name: lora, rslora: true}`.\n"
    yield "## Types that do not run\n\n| type | why |\n| :-- | :-- |"
    refused = itertools.groupby(
        sorted((t.refusal, n.lower()) for n, t in TUNERS.items() if t.refusal), lambda each: each[0]
    )
    for why, each in refused:
        yield f"| {', '.join(f'`{name}`' for _, name in each)} | {why} |"


def main() -> None:
    """Print the page."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for text in page(sys.argv[1:]):
        print(text, flush=True)


if __name__ == "__main__":
    main()
