"""Where an export may be written, and what its folder weighs. Imports no torch.

An export is made in a folder of ours beside its place, ``<folder>.partial``:

MARK     says whose it is: there first and gone last, so that what a kill has left is known
new      what is being written
before   the export that it replaces, between two renames
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.io.bounded_json import plain_json
from sparsegrad_cli.io.paths import discard, exists, expanded, is_file, is_folder

RECORD = "export.json"
PARTIAL, MARK, NEW, BEFORE = ".partial", ".sparsegrad-export", "new", "before"


def free_folder(folder: Path, needed: list[Path], *, overwrite: bool) -> Path:
    """The folder to write, made absolute, or a refusal: what is replaced goes as a whole.

    Args:
        folder: where the user wants it.
        needed: folders that the export reads: the run, the base model.
        overwrite: an earlier export may be replaced.

    Raises:
        UsageError: it is a file, holds something that is no export, or something that is needed;
            or somebody else's stands where it would be made.
    """
    folder = expanded(folder).resolve()
    if exists(folder) and not is_folder(folder):
        raise UsageError(f"{folder} is a file, not a folder", where="--output-dir")
    _check_not_needed(folder, needed)
    _check_not_needed(check_work(folder), needed)
    put_back(folder)
    check_replaceable(folder, overwrite=overwrite)
    return folder


def _check_not_needed(folder: Path, needed: list[Path]) -> None:
    for path in needed:
        if path.resolve().is_relative_to(folder):
            raise UsageError(
                f"{folder} holds what the export is made from: {path}",
                where="--output-dir",
                fix="name another folder",
            )


def check_replaceable(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder with something in it, unless it is an export that may be replaced.

    Raises:
        UsageError: says which.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise UsageError(
            f"the folder {folder} is not empty",
            where="--output-dir",
            fix="--overwrite replaces an earlier export, or name another folder",
        )
    if not _is_export(folder):
        raise UsageError(
            f"the folder {folder} holds something else than an export: it is not replaced",
            where="--output-dir",
            fix="name another folder",
        )


def work_of(folder: Path) -> Path:
    """The folder in which an export is made."""
    return folder.with_name(folder.name + PARTIAL)


def check_work(folder: Path) -> Path:
    """The folder in which an export is made: not there, or left by an export that was killed.

    Raises:
        UsageError: somebody else's has that name.
    """
    work = work_of(folder)
    if os.path.lexists(work) and not _is_work(work):
        raise UsageError(
            f"the export would be made in {work}, and there is something else of that name",
            where="--output-dir",
            fix="rename it or take it away, or name another folder",
        )
    return work


def _is_work(work: Path) -> bool:
    """Marked, or empty: killed before it was."""
    try:
        if work.is_symlink() or not work.is_dir():
            return False
        return is_file(work / MARK) or not any(work.iterdir())
    except OSError:
        return False


def put_back(folder: Path) -> None:
    """Undo a replacement that was cut between its two renames.

    Raises:
        OSError: it cannot be undone.
    """
    work = work_of(folder)
    before = work / BEFORE
    ours = _is_work(work) and before.is_dir() and not before.is_symlink()
    if ours and not os.path.lexists(folder):
        before.replace(folder)


def clear_work(folder: Path) -> None:
    """Take away what an export was made in, as far as that goes; what it replaced stays somewhere.

    The mark goes last: killed here, what is left is still known as ours.
    """
    work = work_of(folder)
    with suppress(OSError):
        put_back(folder)
    discard(work / NEW)
    if os.path.lexists(folder) or not os.path.lexists(work / BEFORE):
        discard(work / BEFORE)
        discard(work)


def _is_export(folder: Path) -> bool:
    try:
        record = plain_json((folder / RECORD).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and "to" in record


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file in it, by name."""
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def open_to_readers(folder: Path) -> None:
    """Give every file the mode that the umask says: safetensors makes its own readable to one."""
    like = folder / ".mode"
    like.touch()
    mode = like.stat().st_mode & 0o777
    like.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)
