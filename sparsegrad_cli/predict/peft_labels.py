"""Find the labels of a PEFT folder, which the folder itself does not name."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.io.atomic import read_tensors
from sparsegrad_cli.io.paths import is_file
from sparsegrad_cli.io.suggest import listed
from sparsegrad_cli.methods.peft_folder import TENSORS
from sparsegrad_cli.records.export import ExportRecord
from sparsegrad_cli.records.store import EXPORT, load

# Ends of the names of a head's output layer, as PEFT saves them.
_HEADS = ("classifier.weight", "score.weight", "out_proj.weight")


class PeftLabels(NamedTuple):
    """The labels of a PEFT folder with the head of a classifier.

    Attributes:
        names: by number.
        problem_type: in transformers' words.
        threshold: of several labels a row: the probability from which one is given.
        note: for the user, if the folder does not name its labels.
    """

    names: tuple[str, ...]
    problem_type: str | None = None
    threshold: float | None = None
    note: str | None = None


def labels_of_peft(folder: Path) -> PeftLabels:
    """Return the labels of a PEFT folder.

    An export of sparsegrad names them in export.json. Of other folders, the shape of the head in
    the file of tensors tells their number.

    Raises:
        UsageError: the folder holds no head of a classifier.
        FileFormatError: a file is missing or damaged.
    """
    if is_file(folder / EXPORT):
        record = load(ExportRecord, folder / EXPORT)
        if record.labels:
            names = tuple(record.labels)
            return PeftLabels(names, record.problem_type, record.label_threshold)
    shapes = {name: tuple(each.shape) for name, each in read_tensors(folder / TENSORS).items()}
    heads = [name for name in shapes if name.endswith(_HEADS) and len(shapes[name]) == 2]
    # Of a head with two layers, the last one gives the labels.
    heads.sort(key=lambda name: name.endswith("out_proj.weight"))
    count = shapes[heads[-1]][0] if heads else 0
    if not count:
        raise UsageError(
            f"{folder} holds an adapter without the head of a classifier",
            where="command line",
            fix="give the run itself, or export it with --to merged",
        )
    names = tuple(f"LABEL_{number}" for number in range(count))
    problem = "regression" if count == 1 else "single_label_classification"
    note = None if count == 1 else f"it does not name its labels: they are {listed(names, 3)}"
    return PeftLabels(names, problem, note=note)
