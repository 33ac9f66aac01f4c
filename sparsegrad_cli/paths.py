"""Looks at paths that anybody may have written: a name that no file can have is not there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def expanded(name: str | Path) -> Path:
    """``~`` and ``~user`` resolved; where there is no such home, the name as it is."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def exists(name: str | Path) -> bool:
    """Whether there is anything of that name that can be looked at."""
    return _holds(Path.exists, name)


def is_file(name: str | Path) -> bool:
    """Whether it is a file, or a link to one."""
    return _holds(Path.is_file, name)


def is_folder(name: str | Path) -> bool:
    """Whether it is a folder, or a link to one."""
    return _holds(Path.is_dir, name)


def _holds(test: Callable[[Path], bool], name: str | Path) -> bool:
    try:
        return test(expanded(name))
    except (OSError, ValueError):  # too long, of a folder closed to us, with a NUL in it
        return False
