"""The folder of a comparison: where its cells run, who may write into it, what is cleared."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.paths import exists, is_folder, refuse_link, remove_folder
from sparsegrad_cli.recipe.loading import digest
from sparsegrad_cli.recipe.study import Cell, LoadedStudy
from sparsegrad_cli.report.access import mappings, text
from sparsegrad_cli.report.records import REPORTS, load_record


def cell_dir(folder: Path, cell: Cell) -> Path:
    """Where a cell of the comparison in ``folder`` runs."""
    return folder / "cells" / safe_name(f"{cell.task}-{cell.label}-s{cell.seed}")


def open_folder(study: LoadedStudy, folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder with something else in it; with ``overwrite``, forget what is done there.

    A comparison may grow by methods, tasks and seeds, and cells that are not done may change: what
    is done there has to be part of this study just as it is.

    Raises:
        UsageError: another comparison, foreign files, or a link or file where a cell would run.
    """
    if overwrite:
        _clear(folder)
    for cell in study.cells:
        path = refuse_link(cell_dir(folder, cell), folder)
        for part in (folder, path.parent, path):
            if exists(part) and not is_folder(part):
                raise UsageError(f"{part} is a file, not a folder", where="output_dir")
    if overwrite or not folder.is_dir() or not any(folder.iterdir()):
        return
    if (folder / "compare.json").is_file():
        strange = _strangers(study, load_record(folder))
        if not strange:
            return
        what = (
            f"{folder} holds another comparison: done there and not part of this one, or with "
            f"other settings, {'is' if len(strange) == 1 else 'are'} {', '.join(strange[:3])}"
            f"{f' and {len(strange) - 3} more' if len(strange) > 3 else ''}"
        )
    else:
        what = f"the folder {folder} is not empty"
    raise UsageError(what, where="output_dir", fix="--overwrite, or another --output-dir")


def _clear(folder: Path) -> None:
    """Remove what a comparison leaves, links to elsewhere without what they name."""
    try:
        for name in ("cells", "answers"):
            remove_folder(folder / name)
        for name in ("compare.json", *REPORTS):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"{folder} cannot be cleared: {error}", where="output_dir") from error


def _strangers(study: LoadedStudy, record: dict[str, Any]) -> list[str]:
    """Finished cells of a record that the study does not have, or not with these settings."""
    here = {(c.task, c.label, str(c.seed)): digest(c.loaded.recipe) for c in study.cells}
    strange = []
    for cell in mappings(record, "cells"):
        task, method, seed = (text(cell, key) or "?" for key in ("task", "method", "seed"))
        wanted = here.get((task, method, seed))
        known = wanted is not None and wanted == text(cell, "run", "recipe_digest")
        if text(cell, "status") == "done" and not known:
            strange.append(f"{task} {method} seed {seed}")
    return strange


def safe_name(text: str) -> str:
    """A folder name of letters, digits, dots and dashes, of one part, that begins with no dot."""
    return re.sub(r"[^\w.+-]+", "-", text)[:200].lstrip(".") or "-"
