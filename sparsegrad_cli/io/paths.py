"""Work with paths that may come from anyone, without raising on names that no file can have.

Links in the folder of a run are not followed to write or to delete, since what they point to may
belong to someone else.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from sparsegrad_cli.errors import FileFormatError, UsageError
from sparsegrad_cli.io.suggest import nearest


def expanded(name: str | Path) -> Path:
    """Resolve ``~`` and ``~user``; return the name unchanged if there is no such home."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def from_here(name: str | Path) -> Path:
    """Return a path relative to the current folder where it lies in it, for display."""
    path = expanded(name)
    try:
        return path.relative_to(Path.cwd())
    except ValueError:
        return path


def exists(name: str | Path) -> bool:
    """Return whether something of that name exists and can be read."""
    return _holds(Path.exists, name)


def is_file(name: str | Path) -> bool:
    """Return whether it is a file, or a link to one."""
    return _holds(Path.is_file, name)


def is_folder(name: str | Path) -> bool:
    """Return whether it is a folder, or a link to one."""
    return _holds(Path.is_dir, name)


def looks_like_folder(name: str) -> bool:
    """Return whether the name of a model can only mean a local folder, and not one on the hub."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def near_folder(name: str, *others: Path) -> str | None:
    """Return ``did you mean ...?`` if a model's folder with a similar name lies in its place.

    Args:
        name: The name of a model, not of an existing folder.
        others: Folders that a relative name may be relative to, besides the current one.
    """
    path = expanded(name)
    for start in (*others, Path()):
        try:
            around = [each for each in (start / path).parent.iterdir() if is_model(each)]
        except (OSError, ValueError):
            continue
        near = nearest(path.name, [each.name for each in around], cutoff=0.7)
        if near:
            return f"did you mean {from_here(path.parent / near)}?"
    return None


def is_model(folder: str | Path) -> bool:
    """Return whether it is a folder with a model's configuration."""
    return is_file(expanded(folder) / "config.json")


def _holds(test: Callable[[Path], bool], name: str | Path) -> bool:
    try:
        return test(expanded(name))
    except (OSError, ValueError):  # too long, of a folder closed to us, with a NUL in it
        return False


def make_folder(path: Path) -> None:
    """Make a folder and its parents, if they do not exist.

    Raises:
        OSError: It cannot be made, or has a thousand parents.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except RecursionError:  # one call a folder; none has been made by then
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), str(path)) from None


def remove_folder(path: Path) -> None:
    """Remove a folder with its content, or a link to one. Anything else stays.

    Raises:
        OSError: It cannot be removed.
    """
    if path.is_symlink():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)


def discard(path: Path) -> None:
    """Remove a file, a link, or a folder with its content; ignore errors.

    rmtree alone would open a pipe and wait.
    """
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def file_digest(path: Path) -> str:
    """Return the sha256 (hex) of a file's bytes.

    Raises:
        FileFormatError: The file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise FileFormatError(
            f"cannot be read: {error.strerror or error}", where=str(path)
        ) from error


def refuse_link(path: Path, inside: Path) -> Path:
    """Return the path, if neither it nor a folder between it and ``inside`` is a link.

    Raises:
        UsageError: Names the link.
    """
    for part in (path, *path.parents):
        if part == inside or part in inside.parents:
            break
        if part.is_symlink():
            raise UsageError(
                f"{part} is a link: what is written there would lie outside {inside}",
                where=str(part),
                fix="remove the link, or replace it by what it points to",
            )
    return path
