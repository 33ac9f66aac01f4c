"""A row of training data that a model of infinite weights cannot bear, and when it is met."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from sparsegrad_cli.data.order import EpochSampler
from support.survival_runs import Bench

POISONED = 17  # the row, with a letter that no other row has
_LETTER = "~"


def poison(base: Path, name: str, where: Any, value: float) -> None:
    """Change one place of a base model's weights."""
    path = base / "model.safetensors"
    tensors = load_file(path)
    found = next(key for key in tensors if key.endswith(name))
    tensors[found][where] = value
    save_file(tensors, path, {"format": "pt"})


def poison_letter(base: Path) -> None:
    """The weights of one token are infinite, and one row has it."""
    from transformers import AutoTokenizer

    (token,) = AutoTokenizer.from_pretrained(base)(_LETTER)["input_ids"]
    poison(base, "word_embeddings.weight", token, float("inf"))


def poisoned_data(bench: Bench, folder: Path) -> Path:
    """The bench's rows, one of them with a letter of its own."""
    source = Path(next(s for s in bench.settings("full") if s.startswith("task.path="))[10:])
    folder.mkdir()
    (folder / "validation.csv").write_bytes((source / "validation.csv").read_bytes())
    with (source / "train.csv").open(encoding="utf-8") as file:
        rows = list(csv.reader(file))
    rows[1 + POISONED][0] += _LETTER
    with (folder / "train.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


def seed_of(fits: Callable[[int], bool]) -> tuple[int, list[int]]:
    """A seed in whose first epoch the row is in a batch of five whose number fits; its order."""
    for seed in range(100):
        order = list(EpochSampler(range(48), seed=seed, strategy="random"))
        if fits(order.index(POISONED) // 5):
            return seed, order
    raise AssertionError("no seed does")
