"""One process at a time in the folder of a run or a study. Imports nothing heavy.

The operating system releases the lock of a process that died, and a forked child does not inherit
it, so the data loaders of a killed run cannot hold its folder. The lock file names the owner.
"""

from __future__ import annotations

import datetime
import errno
import json
import os
import socket
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import BaseFileLock, SoftFileLock, Timeout, UnixFileLock

from sparsegrad_cli.errors import BusyError, DiskError

NAME = ".lock"
_NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP})
_PATIENCE_S = 1.0  # `owner_of` takes a free lock for a moment; a request for the folder outlasts it
_MOST_BYTES = 4096  # read of a lock file
_holds: Counter[str] = Counter()  # lock file -> how often this process holds it


@dataclass(frozen=True)
class Owner:
    """The process that holds a folder: its id, the name of its machine, the time in UTC."""

    pid: int
    host: str
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class FolderLock:
    """Hold a folder for this process; use it as a context manager, or call ``release``.

    A process may hold a folder several times. Others can take it after the last release.

    Args:
        folder: an existing folder.
        wait_s: seconds to wait for another owner; None waits without a limit.
        tell: called with a note if the file system has no locks. The folder is then protected by
            the existence of the lock file, which a killed process on another machine leaves behind.

    Raises:
        BusyError: another living process holds the folder; the message names it.
        DiskError: the lock file cannot be written, for example because it is a link.
    """

    def __init__(
        self,
        folder: Path,
        *,
        wait_s: float | None = _PATIENCE_S,
        tell: Callable[[str], None] = lambda note: None,
    ) -> None:
        self.path = folder.resolve() / NAME
        try:
            self._lock: BaseFileLock | None = _acquire(self.path, -1 if wait_s is None else wait_s)
        except Timeout:
            raise _busy(self.path) from None
        except OSError as error:
            raise DiskError(
                f"the folder {self.path.parent} cannot be written: {error.strerror or error}",
                where=str(self.path.parent),
                fix="check its permissions, or name another output_dir",
            ) from error
        if isinstance(self._lock, SoftFileLock):
            tell(
                f"the file system of {self.path.parent} has no file locks: after a crash, delete "
                f"{self.path} if the folder is reported to be in use"
            )

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    def release(self) -> None:
        """Release the folder, and remove the lock file with the last release."""
        if self._lock is not None:
            _release(self._lock)
        self._lock = None


def owner_of(folder: Path) -> Owner | None:
    """Return the other process that holds a folder; None if it is free or held by this process."""
    path = folder.resolve() / NAME
    lock = _lock(path)
    if lock.is_locked or not os.path.lexists(path):
        return None
    try:
        lock = _acquire(path, 0)
    except Timeout:
        return _read_owner(path) or Owner(0, "unknown", "unknown")
    except OSError:
        return None
    _release(lock)
    return None


def _lock(path: Path) -> BaseFileLock:
    """Return the one lock object of this process for a path."""
    return UnixFileLock(
        path,
        is_singleton=True,
        thread_local=False,
        fallback_to_soft=False,
        on_acquired=_write_owner,
    )


def _acquire(path: Path, timeout_s: float) -> BaseFileLock:
    """Acquire by the kernel's lock, or by a marker file where the file system has no locks.

    Raises:
        Timeout: another process has it.
        OSError: the lock file cannot be opened.
    """
    lock = _lock(path)
    try:
        lock.acquire(timeout=timeout_s)
    except OSError as error:
        if isinstance(error, Timeout) or error.errno not in _NO_LOCKS:
            raise
        with suppress(OSError):
            if path.stat().st_size == 0:  # just made by the attempt; no process's marker
                path.unlink()
        lock = SoftFileLock(path, is_singleton=True, thread_local=False)
        lock.acquire(timeout=timeout_s)
    _holds[lock.lock_file] += 1
    return lock


def _release(lock: BaseFileLock) -> None:
    _holds[lock.lock_file] -= 1
    if not _holds[lock.lock_file] and not isinstance(lock, SoftFileLock):
        # Unlinked while held: a waiting process finds no name for this file and opens a new one.
        with suppress(OSError):
            Path(lock.lock_file).unlink()
    lock.release()


def _write_owner(descriptor: int) -> None:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    owner = Owner(os.getpid(), socket.gethostname(), now)
    with suppress(OSError):  # the lock holds on a full disk, too
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, (json.dumps(asdict(owner)) + "\n").encode(), 0)


def _read_owner(path: Path) -> Owner | None:
    """Return what a lock file says: our JSON, or the process id and host of a marker file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        content = os.pread(descriptor, _MOST_BYTES, 0).decode("utf-8", "replace")
        seconds = os.fstat(descriptor).st_mtime
    except OSError:
        return None
    finally:
        os.close(descriptor)
    try:
        found = json.loads(content)
        return Owner(int(found["pid"]), str(found["host"]), str(found["since"]))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        pass
    words = content.split()
    if len(words) >= 2 and words[0].isdecimal():
        written = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
        return Owner(int(words[0][:20]), words[1], written.isoformat(timespec="seconds"))
    return None


def _busy(path: Path) -> BusyError:
    owner = _read_owner(path)
    return BusyError(
        f"{path.parent} is in use by {owner or 'another process'}",
        where=str(path.parent),
        fix="wait for it to end, stop it, or name another output_dir",
        details=asdict(owner) if owner else None,
    )
