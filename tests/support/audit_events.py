"""Detect and block forbidden side effects of reading a file, with Python's audit events.

Forbidden are running a program, a pickle or code that lies among the files, network access, and
writing, moving or removing anything outside the temporary folders of a case. Libraries in C raise
no audit events when they write, so tests also compare whole folders (hostile_cases.folder_content).
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_RUNS = frozenset(
    (
        *("os.system", "os.exec", "os.spawn", "os.posix_spawn", "os.fork", "os.forkpty"),
        *("subprocess.Popen", "pty.spawn", "pickle.find_class", "webbrowser.open"),
        *("socket.connect", "socket.getaddrinfo", "socket.bind", "urllib.Request"),
    )
)
# event -> (arguments that are changed paths, argument that is an open folder)
_CHANGES: dict[str, tuple[tuple[int, ...], int | None]] = {
    **dict.fromkeys(("os.remove", "os.rmdir", "shutil.rmtree"), ((0,), 1)),
    "os.mkdir": ((0,), 2),
    "os.truncate": ((0,), None),
    "os.rename": ((0, 1), 2),
    "os.link": ((1,), 3),
    "os.symlink": ((1,), 2),
}
_HERE = (-1, None)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Caches that an import or a first plot writes wherever it can.
_CACHES = frozenset(("__pycache__", "matplotlib"))

_places: set[Path] = set()  # the temporary folders of this session
_seen: list[str] | None = None  # forbidden events of the running case


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "tempfile.mkdtemp":
        _places.add(Path(arguments[0]).resolve())
    if _seen is None:
        return
    what = _forbidden(event, arguments)
    if what is not None:
        _seen.append(what)
        raise PermissionError(what)


def _forbidden(event: str, arguments: tuple[Any, ...]) -> str | None:
    if event in _RUNS:
        return f"{event} {arguments!r:.200}"
    if event == "exec":
        named = getattr(arguments[0], "co_filename", "")
        return f"code of {named} is run" if named and _is_ours(Path(named)) else None
    if event == "open":
        path, _, flags = arguments
        links = not flags & (os.O_EXCL | getattr(os, "O_NOFOLLOW", 0))
        return _outside(event, [path] if flags & _WRITING else [], through_links=links)
    changed, folder = _CHANGES.get(event, ((), None))
    if folder is not None and arguments[folder] not in _HERE:
        return None  # rmtree works in an open folder, and has raised its own event
    return _outside(event, [arguments[number] for number in changed], through_links=False)


def _outside(event: str, paths: list[Any], *, through_links: bool) -> str | None:
    for path in paths:
        if isinstance(path, int):
            continue
        named = Path(os.fsdecode(path))
        real = named.resolve() if through_links else named.parent.resolve() / named.name
        if not (_is_ours(real) or str(real) == os.devnull or _CACHES & set(real.parts)):
            return f"{event} of {real}, outside the folders of the case"
    return None


def _is_ours(path: Path) -> bool:
    # Called for all code that runs; a session may have made ten thousand folders.
    return path in _places or not _places.isdisjoint(path.parents)


sys.addaudithook(_watch)


@contextlib.contextmanager
def no_side_effects() -> Iterator[None]:
    """Raise PermissionError for forbidden side effects, and report them at the end in any case.

    Raises:
        AssertionError: something forbidden was tried, even if the PermissionError was caught.
    """
    global _seen
    before, _seen = _seen, []
    try:
        yield
    finally:
        seen, _seen = _seen, before
        assert not seen, "; ".join(seen)
