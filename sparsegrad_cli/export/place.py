"""Where an export may be written, and what its folder weighs. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.paths import exists, expanded, is_folder
from sparsegrad_cli.plain_json import plain_json

RECORD = "export.json"


def free_folder(folder: Path, needed: list[Path], *, overwrite: bool) -> Path:
    """The folder to write, made absolute, or a refusal: what is replaced goes as a whole.

    Args:
        folder: where the user wants it.
        needed: folders that the export reads: the run, the base model.
        overwrite: an earlier export may be replaced.

    Raises:
        UsageError: it is a file, holds something that is no export, or something that is needed.
    """
    folder = expanded(folder).resolve()
    if exists(folder) and not is_folder(folder):
        raise UsageError(f"{folder} is a file, not a folder", where="--output-dir")
    for path in needed:
        if path.resolve().is_relative_to(folder):
            raise UsageError(
                f"{folder} holds what the export is made from: {path}",
                where="--output-dir",
                fix="name another folder",
            )
    if not folder.is_dir() or not any(folder.iterdir()):
        return folder
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
    return folder


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
