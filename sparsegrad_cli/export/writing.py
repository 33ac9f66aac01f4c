"""An export's folder is in its place whole, or not at all, and nobody else's is touched for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from sparsegrad_cli.errors import DiskError
from sparsegrad_cli.export.place import (
    BEFORE,
    MARK,
    NEW,
    check_replaceable,
    check_work,
    clear_work,
    put_back,
)
from sparsegrad_cli.io.atomic import sync_folder, sync_tree
from sparsegrad_cli.io.paths import make_folder


def write_export(folder: Path, fill: Callable[[Path], None], *, overwrite: bool) -> None:
    """Fill a new folder in one of ours beside its place, then rename it into place.

    Args:
        overwrite: an export that stands there is replaced.

    Raises:
        UsageError: since :func:`free_folder` looked, something else has come to stand there.
        DiskError: something could not be written. As with any other error, nothing is left of the
            attempt, and what stood at ``folder`` before is untouched.
    """
    work, made = check_work(folder), False
    try:
        put_back(folder)
        clear_work(folder)  # of an export that was killed
        make_folder(work.parent)
        work.mkdir()
        made = True
        (work / MARK).write_text("sparsegrad export is at work here, or was killed\n", "utf-8")
        (work / NEW).mkdir()
        fill(work / NEW)
        sync_tree(work)
        check_replaceable(folder, overwrite=overwrite)
        if folder.exists():  # moved aside, so that a failing rename does not lose it
            folder.replace(work / BEFORE)
        (work / NEW).replace(folder)
        sync_folder(folder.parent)
    except (OSError, SafetensorError) as error:
        raise DiskError(
            f"{folder.name} could not be written: {error}",
            where=str(folder),
            fix="free some space, or name another --output-dir",
        ) from error
    finally:
        if made:
            clear_work(folder)
