"""Read GLUE's test splits, whose labels are hidden, for a submission to gluebenchmark.com."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparsegrad_cli.data.glue import (
    HUB_ID,
    ORIGINAL_NAMES,
    SUFFIXES,
    original_column,
    read_split,
    task_folder,
)
from sparsegrad_cli.data.hub import hub_table, load_hub_splits
from sparsegrad_cli.data.label_texts import is_plain_integer
from sparsegrad_cli.data.split_files import find_split, tried_names
from sparsegrad_cli.data.tables import Table, read_text_cell
from sparsegrad_cli.errors import DataError, DownloadError, UsageError
from sparsegrad_cli.recipe.tasks import GLUE_TASKS, TaskSpec

# Task -> test split -> name of its file in a submission.
_FILES = {
    "cola": {"test": "CoLA.tsv"},
    "sst2": {"test": "SST-2.tsv"},
    "mrpc": {"test": "MRPC.tsv"},
    "stsb": {"test": "STS-B.tsv"},
    "qqp": {"test": "QQP.tsv"},
    "mnli": {"test_matched": "MNLI-m.tsv", "test_mismatched": "MNLI-mm.tsv"},
    "qnli": {"test": "QNLI.tsv"},
    "rte": {"test": "RTE.tsv"},
    "wnli": {"test": "WNLI.tsv"},
}
_DIAGNOSTIC = "AX.tsv"  # A set of its own, answered by a model of MNLI.
_INDEX = ("index", "idx", "id")


@dataclass(frozen=True)
class HiddenSplit:
    """One test split.

    Attributes:
        file: name of its file in a submission, such as ``CoLA.tsv``.
        texts: the first texts, and the second ones of a task of pairs.
    """

    file: str
    texts: list[list[str]]


def load_test_splits(task: str, path: Path | None) -> tuple[list[HiddenSplit], list[str]]:
    """Read the test splits of a GLUE task in the order of their indices, and notes for the user.

    Args:
        task: short name: ``cola``, ``rte``, ...
        path: the folder of the task, or its parent; None reads the hub's nyu-mll/glue.

    Raises:
        UsageError: the folder is that of another task.
        DataError: a test file is missing or damaged, or its indices have gaps.
        DownloadError: it is neither cached nor reachable on the hub.
    """
    spec, found = GLUE_TASKS[task], []
    for split, file in _FILES[task].items():
        table = _hub(task, split) if path is None else _local(task, path, split)
        found.append(_split(spec, table, file))
    if task != "mnli":
        return found, []
    diagnostic = _hub_diagnostic() if path is None else _local_diagnostic(path)
    if diagnostic is None:
        return found, [f"{_DIAGNOSTIC} is not written: the diagnostic set is not there"]
    return [*found, _split(spec, diagnostic, _DIAGNOSTIC)], []


def _local(task: str, path: Path, split: str) -> Table:
    folder = task_folder(task, path)
    files = find_split(folder, (split,), SUFFIXES)
    if not files:
        raise DataError(
            f"glue/{task} has no {split.replace('_', ' ')} file in {folder}",
            where="task.path",
            fix=f"tried: {tried_names((split,), SUFFIXES)}; task.path=FOLDER names another folder",
        )
    return read_split(task, files, split)


def _hub(task: str, split: str) -> Table:
    fix = "task.path=FOLDER, a folder with the test file; or connect once to fill the cache"
    loaded, _ = load_hub_splits(HUB_ID, (split,), config=task, called=f"glue/{task}", fix=fix)
    return hub_table(loaded[split], f"{HUB_ID} {task} {split}")


def _local_diagnostic(path: Path) -> Table | None:
    folder = task_folder("mnli", path)
    places = [folder, *(near / "diagnostic" for near in (path, folder.parent, folder))]
    for place in places:
        files = find_split(place, ("diagnostic",), SUFFIXES)
        if files:
            return read_split("ax", files, "diagnostic")
    return None


def _hub_diagnostic() -> Table | None:
    try:
        loaded, _ = load_hub_splits(HUB_ID, ("test",), config="ax", called="glue/ax", fix="")
    except (DownloadError, UsageError):
        return None
    return hub_table(loaded["test"], f"{HUB_ID} ax test")


def _split(spec: TaskSpec, table: Table, file: str) -> HiddenSplit:
    # The diagnostic set has the columns of the hub's pairs under the names of the original files.
    originals = ORIGINAL_NAMES.get(spec.name.removeprefix("glue/"), {})
    names = [original_column(table, name, originals) for name in spec.text_columns]
    order = _order(table)
    texts = [[read_text_cell(table, name, row, blank=True) for row in order] for name in names]
    return HiddenSplit(file, texts)


def _order(table: Table) -> list[int]:
    """Return the rows in the order of their indices, which must be 0 to N - 1.

    A table without indices is in that order already.
    """
    name = next((name for name in _INDEX if name in table.columns), None)
    if name is None:
        return list(range(len(table)))
    place: dict[int, int] = {}
    for row, value in enumerate(table.columns[name]):
        text = str(value).strip()
        index = int(text) if is_plain_integer(text) else -1
        if not 0 <= index < len(table) or index in place:
            raise DataError(
                f"expected the indices 0 to {len(table) - 1}, each once, got {text!r:.40}",
                where=table.place(row),
                fix="fetch the file again: a submission needs every row",
            )
        place[index] = row
    return [place[index] for index in range(len(table))]
