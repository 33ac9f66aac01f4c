"""A training row that makes the loss infinite, and seeds that place it in a given batch."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from sparsegrad_cli.data.order import EpochSampler
from support.survival_runs import Workspace

NAN_ROW = 17  # the row with a letter that no other row has
_LETTER = "~"


def set_weight(base: Path, name: str, where: Any, value: float) -> None:
    """Change one weight of a base model."""
    path = base / "model.safetensors"
    tensors = load_file(path)
    found = next(key for key in tensors if key.endswith(name))
    tensors[found][where] = value
    save_file(tensors, path, {"format": "pt"})


def set_infinite_embedding(base: Path) -> None:
    """Make the embedding of one letter infinite; only one row has that letter."""
    from transformers import AutoTokenizer

    (token,) = AutoTokenizer.from_pretrained(base)(_LETTER)["input_ids"]
    set_weight(base, "word_embeddings.weight", token, float("inf"))


def data_with_nan_row(workspace: Workspace, folder: Path) -> Path:
    """Copy the data of the workspace, with the extra letter in one row."""
    source = Path(next(s for s in workspace.settings("full") if s.startswith("task.path="))[10:])
    folder.mkdir()
    (folder / "validation.csv").write_bytes((source / "validation.csv").read_bytes())
    with (source / "train.csv").open(encoding="utf-8") as file:
        rows = list(csv.reader(file))
    rows[1 + NAN_ROW][0] += _LETTER
    with (folder / "train.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


def seed_where(fits: Callable[[int], bool]) -> tuple[int, list[int]]:
    """Return a seed whose first epoch has the row in a batch that ``fits``, and its order."""
    for seed in range(100):
        order = list(EpochSampler(range(48), seed=seed, strategy="random"))
        if fits(order.index(NAN_ROW) // 5):
            return seed, order
    raise AssertionError("no seed fits")
