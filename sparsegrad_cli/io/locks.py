"""One process at a time in a run's folder. The system lets go of a lock whose owner is killed.

A record lock (``fcntl.lockf``), not flock: children of a fork do not inherit it, so that a killed
run's data loaders cannot hold on to it. The file also says in words who holds it. Imports nothing
heavy.
"""

from __future__ import annotations

import datetime
import errno
import fcntl
import json
import os
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from sparsegrad_cli.errors import BusyError, DiskError

NAME = ".lock"
_BUSY = (errno.EACCES, errno.EAGAIN)
# Folders that this process holds. To close any file on a lock of one's own lets go of it.
_OURS: set[Path] = set()


@dataclass(frozen=True)
class Owner:
    """Who holds a lock: process id, name of the machine, time in UTC (ISO 8601)."""

    pid: int
    host: str
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class RunLock:
    """Holds a folder for this process; use as a context, or ``release`` it.

    Args:
        folder: must exist.

    Raises:
        BusyError: another living process holds it; says which.
        DiskError: the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder.resolve() / NAME
        if self.path in _OURS:
            raise self._busy(None)
        while True:
            self._file = self._open()
            try:
                if self._claim():
                    break
            except BaseException:
                os.close(self._file)
                raise
            os.close(self._file)  # its last owner has just taken the file away: make a new one
        _OURS.add(self.path)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        content = json.dumps(asdict(Owner(os.getpid(), socket.gethostname(), now))) + "\n"
        try:
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, content.encode(), 0)
        except OSError:
            return  # a full disk: the lock holds all the same

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    def release(self) -> None:
        """Let go, and leave no file."""
        if self._file < 0:
            return
        with suppress(OSError):
            self.path.unlink()
        os.close(self._file)  # the lock goes with it
        self._file = -1
        _OURS.discard(self.path)

    def _open(self) -> int:
        try:
            # A link of that name may name anybody's file, and is written to: it is refused.
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            return os.open(self.path, flags, 0o666)
        except OSError as error:
            raise DiskError(
                f"the folder {self.path.parent} cannot be written: {error.strerror or error}",
                where=str(self.path.parent),
                fix="check its permissions, or name another output_dir",
            ) from error

    def _claim(self) -> bool:
        """Whether the lock is ours, and that of the file which stands there."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = _read(self._file)
            # Without locks in the file system, the word of the file has to do.
            if error.errno in _BUSY or (owner is not None and _lives(owner)):
                raise self._busy(owner) from None
        try:
            return os.path.samestat(os.fstat(self._file), self.path.stat())
        except FileNotFoundError:
            return False

    def _busy(self, owner: Owner | None) -> BusyError:
        who = str(owner) if owner else "another run"
        return BusyError(
            f"{self.path.parent} is in use by {who}",
            where=str(self.path.parent),
            fix="wait for it to end, stop it, or name another output_dir",
            details=asdict(owner) if owner else None,
        )


def owner_of(folder: Path) -> Owner | None:
    """The other process that holds a folder; None if it is free, or held by this one."""
    path = folder.resolve() / NAME
    if path in _OURS:
        return None
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        owner = _read(file)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _BUSY:
                return owner or Owner(0, "unknown", "unknown")
            return owner if owner is not None and _lives(owner) else None
        return None
    finally:
        os.close(file)


def _read(file: int) -> Owner | None:
    try:
        found = json.loads(os.pread(file, 4096, 0))
        return Owner(int(found["pid"]), str(found["host"]), str(found["since"]))
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def _lives(owner: Owner) -> bool:
    """Whether the process may be alive; on another machine nobody can tell."""
    if owner.host != socket.gethostname():
        return True
    if owner.pid == os.getpid():  # an earlier process of this number
        return False
    if not 0 < owner.pid < 2**31:  # no process's
        return False
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
