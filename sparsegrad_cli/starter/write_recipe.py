"""Write a commented recipe for data that was looked at."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsegrad_cli.data.text_tokens import TextEncoder
from sparsegrad_cli.models.pretrained import load_tokenizer
from sparsegrad_cli.recipe.schema import ModelSection
from sparsegrad_cli.starter.inspect_data import FoundData

_CLASSIFIER, _CHAT_MODEL = "builtin:minilm", "builtin:smollm2"
_LONGEST = 512  # Tokens; more is possible, and slow without a GPU.
_COVERED = 0.95  # Share of the rows that max_length does not cut.
_STEPS = 300  # Optimizer steps that a small data set should give.
_UNBALANCED = 0.8  # Share of the largest class from which accuracy says little.


@dataclass(frozen=True)
class Starter:
    """The settings of a first recipe, with the reason for each.

    Attributes:
        model: the model.
        max_length: tokens of an example.
        longest: tokens of the longest sampled example; None for conversations.
        cut: share of the sampled rows that max_length cuts.
        batch: examples in a step.
        epochs: passes over the data.
        metric: the metric, where the default says little.
        output_dir: folder of the run.
    """

    model: str
    max_length: int
    longest: int | None
    cut: float
    batch: int
    epochs: int
    metric: str | None
    output_dir: str


def plan_recipe(found: FoundData, model: str | None = None) -> Starter:
    """Choose settings for the data.

    Args:
        found: the data.
        model: the model; by default one that comes with the package.

    Raises:
        DownloadError, FileFormatError: the model's tokenizer cannot be loaded.
    """
    name = model or (_CHAT_MODEL if found.is_chat else _CLASSIFIER)
    stem = re.sub(r"[^\w.-]+", "-", found.path.name.partition(".")[0]) or "data"
    output = f"runs/{stem}"
    if found.is_chat:
        return Starter(name, 512, None, 0.0, 4, 3 if found.rows < 2000 else 1, None, output)
    lengths = _lengths(found, name)
    wanted = lengths[min(len(lengths) - 1, math.ceil(_COVERED * len(lengths)) - 1)]
    most = min(_LONGEST, max(16, 8 * math.ceil(wanted / 8)))
    batch = 32 if most <= 128 else 16 if most <= 256 else 8
    batch = min(batch, max(4, 2 ** int(math.log2(max(found.rows / 10, 4)))))
    epochs = min(20, max(3, math.ceil(_STEPS * batch / max(found.rows, 1))))
    metric = "f1_macro" if found.majority > _UNBALANCED else None
    cut = sum(length > most for length in lengths) / len(lengths)
    return Starter(name, most, lengths[-1], cut, batch, epochs, metric, output)


def _lengths(found: FoundData, model: str) -> list[int]:
    """Return the numbers of tokens of the sampled rows, ascending."""
    tokenizer = load_tokenizer(ModelSection(name=model))
    encoder = TextEncoder(
        tokenizer, pair=found.text_pair is not None, max_length=10**6, padding="dynamic"
    )
    columns, _ = encoder.encode(*(list(part) for part in zip(*found.sample, strict=True)))
    return sorted(len(ids) for ids in columns["input_ids"])


def recipe_text(found: FoundData, plan: Starter, relative_to: Path) -> str:
    """Return the recipe as YAML with comments.

    Args:
        found: the data.
        plan: the settings.
        relative_to: the folder that the recipe will be in; paths in it are relative to that.
    """
    lines = [
        f"# A first recipe for {found.path.name}, written by sparsegrad init.",
        "# sparsegrad explain KEY says what a key means.",
        f"model: {_quoted(plan.model)}  # {_model_words(plan.model)}",
        "task:",
        f"  name: {found.task}",
        f"  path: {_quoted(_relative(found.path, relative_to))}",
        *_column_lines(found),
        *(["  type: multilabel  # a row may have several labels, or none"] * found.multilabel),
        *_separator_lines(found),
        f"  max_length: {plan.max_length}  # {_length_words(plan)}",
        *([f"  metric: {plan.metric}  # {_metric_words(found)}"] if plan.metric else []),
        *([] if found.validation_rows else _validation_lines()),
        "method: {name: sparsegrad, density: 0.01}  # trains 1 % of the MLP weights; or lora, full",
        "scope: head  # what trains besides: the classifier's head; or rest, for everything",
        "train:",
        "  learning_rate: 1e-3  # matters most: sparsegrad compare RECIPE --tune 8 tries several",
        f"  per_device_train_batch_size: {plan.batch}",
        f"  num_train_epochs: {plan.epochs}  # {_epoch_words(found, plan)}",
        "  lr_scheduler_type: linear",
        "  warmup_steps: 0.06  # a share of all steps",
        *(_weight_lines(found) if found.unbalanced else []),
        "seed: 42",
        f"output_dir: {_quoted(plan.output_dir)}",
    ]
    return "\n".join(lines) + "\n"


def _column_lines(found: FoundData) -> list[str]:
    if found.is_chat:
        return []
    roles = {"text": found.text, "text_pair": found.text_pair, "label": found.label}
    named = ", ".join(f"{role}: {_quoted(name)}" for role, name in roles.items() if name)
    if found.labels:
        named += f", labels: [{', '.join(map(_quoted, found.labels))}]"
    return [f"  columns: {{{named}}}"]


def _separator_lines(found: FoundData) -> list[str]:
    mark = found.label_separator
    return [f"  label_separator: {_quoted(mark)}  # between the labels of a cell"] if mark else []


def _weight_lines(found: FoundData) -> list[str]:
    (most, rows), (least, few) = (list(found.classes.items())[at] for at in (0, -1))
    count = "1 row is" if few == 1 else f"{few:,} rows are"
    words = f"{count} {_quoted(least)}, {rows:,} {_quoted(most)}"
    return [f"  # class_weights: balanced  # {words}: makes rare ones count as much"]


def _validation_lines() -> list[str]:
    return ["  validation_fraction: 0.1  # split off at random, the same for every seed"]


def _model_words(model: str) -> str:
    if model == "builtin:mpnet":
        return "MPNet-base, 110 million parameters"
    if model.startswith("builtin:"):
        return "comes with the package; roberta-base and others are better and are downloaded"
    return "as given"


def _length_words(plan: Starter) -> str:
    if plan.longest is None:
        return "longer conversations are left out, with a note"
    if not plan.cut:
        return f"tokens; the longest sampled row has {plan.longest}"
    return f"tokens; cuts {100 * plan.cut:.0f} % of the rows, the longest has {plan.longest}"


def _metric_words(found: FoundData) -> str:
    return f"{100 * found.majority:.0f} % of the rows have one class, so accuracy says little"


def _epoch_words(found: FoundData, plan: Starter) -> str:
    return f"about {math.ceil(found.rows * plan.epochs / plan.batch):,} steps"


def _relative(path: Path, folder: Path) -> str:
    absolute = path.resolve()
    try:
        return str(absolute.relative_to(folder.resolve()))
    except ValueError:
        return str(absolute)


def _quoted(text: Any) -> str:
    """Return text as a YAML scalar, with quotes where it needs them."""
    plain = re.fullmatch(r"[A-Za-z_./][\w./-]*", str(text)) is not None
    words = ("true", "false", "null", "yes", "no", "on", "off", "y", "n")
    return str(text) if plain and str(text).lower() not in words else json.dumps(str(text))
