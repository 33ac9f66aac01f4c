"""Read GLUE's original files: tab-separated, with quotes as text.

CoLA has no header. QQP has rows that a line break tore in two. STS-B has rows with extra columns.
MRPC's training and development parts are cut from one file of Microsoft's corpus.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsegrad_cli.data.delimited import check_width, unquoted_rows
from sparsegrad_cli.data.tables import Table
from sparsegrad_cli.data.text_files import read_text
from sparsegrad_cli.errors import DataError

_COLA_HEADER = ["source", "label", "mark", "sentence"]
_MRPC_TRAIN = "msr_paraphrase_train.txt"
_MRPC_TEST = "msr_paraphrase_test.txt"
_MRPC_DEV_IDS = ("mrpc_dev_ids.tsv", "dev_ids.tsv")
_MRPC_ID_COLUMNS = ("#1 ID", "#2 ID")


def read_original(task: str, path: Path, split: str = "") -> Table:
    """Read a file of the original layout as a table with its own column names.

    Args:
        task: short name of the task; it says which rows of another width are expected.
        path: the file.
        split: its split, for the note on torn rows.

    Raises:
        DataError: the file has no rows, or a row has the wrong number of columns.
    """
    rows = list(unquoted_rows(read_text(path)))
    if task == "cola" and (not rows or "sentence" not in rows[0][1]):
        header = _COLA_HEADER
    else:
        header = [name.strip() for name in rows[0][1]] if rows else []
        rows = rows[1:]
    # A line break inside a question tore some rows of the published QQP file in two. The hub's
    # copy leaves them out as well.
    torn = [line for line, cells in rows if task == "qqp" and len(cells) != len(header)]
    rows = [(line, cells) for line, cells in rows if line not in set(torn)]
    for line, cells in rows:
        if task != "stsb" or len(cells) < len(header):
            check_width(cells, len(header), path, line)
    if not rows:
        raise DataError("the file holds no rows", where=str(path))
    notes: tuple[str, ...] = ()
    if torn:
        notes = (f"{split}: {len(torn)} torn lines of {path.name} left out, as in nyu-mll/glue",)
    columns = {name: [cells[at] for _, cells in rows] for at, name in enumerate(header)}
    return Table(columns, str(path), [line for line, _ in rows], notes=notes)


@dataclass(frozen=True)
class MrpcCorpus:
    """Both parts of MRPC, and a note that says how they were told apart."""

    train: Table
    validation: Table
    note: str


def mrpc_corpus(folder: Path) -> MrpcCorpus | None:
    """Read MRPC from the files that Microsoft published; None if the folder lacks them.

    Validation is, in this order: dev.tsv, whose rows are removed from training; the training rows
    that mrpc_dev_ids.tsv or dev_ids.tsv names; the test part of the corpus.

    Raises:
        DataError: a row is damaged, or there is nothing to validate on.
    """
    source = folder / _MRPC_TRAIN
    if (folder / "train.tsv").is_file() or not source.is_file():
        return None
    table = _read_mrpc(source)
    if (folder / "dev.tsv").is_file():
        validation = _read_mrpc(folder / "dev.tsv")
        train = _select(table, set(_mrpc_ids(validation)), inside=False)
        return MrpcCorpus(
            train, validation, f"training is {_MRPC_TRAIN} without the rows of dev.tsv"
        )
    for name in _MRPC_DEV_IDS:
        if (folder / name).is_file():
            rows = unquoted_rows(read_text(folder / name))
            ids: set[tuple[str, ...]] = {(cells[0], cells[-1]) for _, cells in rows}
            train, validation = (_select(table, ids, inside=inside) for inside in (False, True))
            note = f"validation is the rows of {_MRPC_TRAIN} in {name}"
            return MrpcCorpus(train, validation, note)
    if (folder / _MRPC_TEST).is_file():
        note = (
            f"validation is {_MRPC_TEST}, the test part of the corpus: no GLUE dev part was found"
        )
        return MrpcCorpus(table, _read_mrpc(folder / _MRPC_TEST), note)
    raise DataError(
        f"glue/mrpc has no validation file in {folder}",
        where="task.path",
        fix=f"tried: dev.tsv, {', '.join(_MRPC_DEV_IDS)}, {_MRPC_TEST}",
    )


def _read_mrpc(path: Path) -> Table:
    table = read_original("mrpc", path)
    for name in _MRPC_ID_COLUMNS:
        if name not in table.columns:
            raise DataError(
                f"there is no column {name!r}",
                where=str(path),
                fix=f"columns found: {', '.join(table.columns)}",
            )
    return table


def _mrpc_ids(table: Table) -> list[tuple[str, ...]]:
    return list(zip(*(table.columns[name] for name in _MRPC_ID_COLUMNS), strict=True))


def _select(table: Table, ids: set[tuple[str, ...]], *, inside: bool) -> Table:
    """Return the rows whose ids are among ``ids``, or those whose ids are not."""
    rows: Sequence[int] = [at for at, key in enumerate(_mrpc_ids(table)) if (key in ids) is inside]
    columns = {name: [values[row] for row in rows] for name, values in table.columns.items()}
    lines = table.lines or []
    return Table(columns, table.source, [lines[row] for row in rows])
