"""Check the folder that an export is written to, and write it atomically. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from sparsegrad_cli.errors import DiskError, UsageError
from sparsegrad_cli.io.atomic import put_back, write_folder
from sparsegrad_cli.io.bounded_json import plain_json
from sparsegrad_cli.io.paths import exists, expanded, is_folder
from sparsegrad_cli.records.store import EXPORT


def check_output_folder(folder: Path, needed: list[Path], *, overwrite: bool) -> Path:
    """Return the absolute path of the folder, or refuse it.

    Args:
        folder: Where the user wants the export.
        needed: Folders that the export reads: the run, the base model.
        overwrite: Whether an earlier export may be replaced, as a whole.

    Raises:
        UsageError: It is a file, contains a needed folder, or is not empty.
        DiskError: The folder that it is made in cannot be written.
    """
    folder = expanded(folder).resolve()
    if exists(folder) and not is_folder(folder):
        raise UsageError(f"{folder} is a file, not a folder", where="--output-dir")
    for path in needed:
        if path.resolve().is_relative_to(folder):
            raise UsageError(
                f"the folder {folder} contains what the export is made from: {path}",
                where="--output-dir",
                fix="name another folder",
            )
    _check_writable(folder)
    put_back(folder, _stem(folder))
    _check_replaceable(folder, overwrite=overwrite)
    return folder


def write_export(folder: Path, fill: Callable[[Path], None], *, overwrite: bool) -> None:
    """Fill a temporary folder, check ``folder`` once more, and rename into place.

    Raises:
        UsageError: Something else has appeared at ``folder`` in the meantime.
        DiskError: A file cannot be written. After this or any other error the temporary files are
            removed, and an earlier export is unchanged.
    """

    def fill_and_check(partial: Path) -> None:
        fill(partial)
        _check_replaceable(folder, overwrite=overwrite)

    advice = "free some space or check the permissions, or name another --output-dir"
    write_folder(folder, fill_and_check, fix=advice, stem=_stem(folder))


def file_sizes(folder: Path) -> dict[str, int]:
    """Return the bytes of every file in a folder, by relative path."""
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def make_readable(folder: Path) -> None:
    """Give every file the mode of the umask; safetensors makes files readable by the owner only."""
    like = folder / ".mode"
    like.touch()
    mode = like.stat().st_mode & 0o777
    like.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def _stem(folder: Path) -> Path:
    """Return the prefix of temporary names, which does not match other files of the user."""
    return folder.with_name(f".{folder.name}.sparsegrad-export")


def _check_replaceable(folder: Path, *, overwrite: bool) -> None:
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise UsageError(
            f"the folder {folder} is not empty",
            where="--output-dir",
            fix="--overwrite replaces an earlier export; or name another folder",
        )
    if not _is_export(folder):
        raise UsageError(
            f"the folder {folder} holds something other than an export and is not replaced",
            where="--output-dir",
            fix="name another folder",
        )


def _check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be made, before a model is loaded for it."""
    place = next(parent for parent in folder.parents if exists(parent))
    if not is_folder(place) or not os.access(place, os.W_OK | os.X_OK):
        raise DiskError(
            f"{folder.name} cannot be made: {place} cannot be written",
            where="--output-dir",
            fix="check the permissions, or name another --output-dir",
        )


def _is_export(folder: Path) -> bool:
    try:
        record = plain_json((folder / EXPORT).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and "to" in record
