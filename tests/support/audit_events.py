"""What no file may bring about, seen through Python's audit events, and stopped.

That a program, a pickle or code lying among the files is run, that the network is asked, or that
anything outside of the temporary folders of a case is written, moved or removed. Libraries in C
tell nothing of what they write: whole folders are compared for that (hostility.tree).
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
# Which arguments are paths that it changes (links themselves), and which is an open folder.
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
# What an import or a first plot writes wherever it can: no business of a case's.
_CACHES = frozenset(("__pycache__", "matplotlib"))

_places: set[Path] = set()  # temporary folders of this session
_seen: list[str] | None = None  # of the case that is being tried


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
        return None  # in a folder that is open: rmtree's, which has told of it
    return _outside(event, [arguments[number] for number in changed], through_links=False)


def _outside(event: str, paths: list[Any], *, through_links: bool) -> str | None:
    for path in paths:
        if isinstance(path, int):
            continue
        named = Path(os.fsdecode(path))
        real = named.resolve() if through_links else named.parent.resolve() / named.name
        if not (_is_ours(real) or str(real) == os.devnull or _CACHES & set(real.parts)):
            return f"{event} of {real}, outside of the case's folders"
    return None


def _is_ours(path: Path) -> bool:
    # Asked of all code that is run, where a session may have made ten thousand places.
    return path in _places or not _places.isdisjoint(path.parents)


sys.addaudithook(_watch)


@contextlib.contextmanager
def nothing_done() -> Iterator[None]:
    """Inside, what is forbidden ends in a PermissionError; swallowed or not, it is told at the end.

    Raises:
        AssertionError: says what was tried.
    """
    global _seen
    before, _seen = _seen, []
    try:
        yield
    finally:
        seen, _seen = _seen, before
        assert not seen, "; ".join(seen)
