"""Locks on files, by which processes share a comparison. The system lets go of those of the dead.

flock, not a record lock: the process of a cell is handed the open file (``pass_fds``) and holds the
lock, too. Should the comparing process be killed, the cell that it started is nobody else's before
it has ended by itself. In a file system without locks everything is granted. Imports nothing heavy.
"""

from __future__ import annotations

import datetime
import fcntl
import os
import socket
from contextlib import suppress
from pathlib import Path

from sparsegrad_cli.errors import DiskError
from sparsegrad_cli.io.untrusted_text import printable_line

_MOST_WORDS = 200  # bytes read of what a claim says


class FileLock:
    """A file to lock, made if missing; use as a context, or ``close`` it.

    Raises:
        DiskError: the file cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # A link of that name may name anybody's file, and is written to: it is refused.
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._file = os.open(path, flags, 0o666)
        except OSError as error:
            raise DiskError(
                f"{path} cannot be written: {error.strerror or error}",
                where=str(path.parent),
                fix="check its permissions, or name another --output-dir",
            ) from error

    def __enter__(self) -> FileLock:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def fileno(self) -> int:
        """The descriptor, to be handed on to a process that shall hold the lock, too."""
        return self._file

    def take(self, *, shared: bool = False, wait: bool = False) -> bool:
        """Whether the lock is ours now; in place of what was held before, if anything was."""
        kind = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
        try:
            fcntl.flock(self._file, kind)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            return True
        return True

    def let_go(self) -> None:
        """Unlock, also for those whom the file was handed on to."""
        with suppress(OSError):
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def close(self) -> None:
        """Unlock and close."""
        if self._file >= 0:
            self.let_go()
            os.close(self._file)
            self._file = -1


class Claim(FileLock):
    """The sole right to run something, said by a file that is there as long; see :func:`claim`."""

    held = False

    def settle(self) -> bool:
        """Whether it is ours now: the lock is, and the file is still the one of that name."""
        if not self.take():
            return False
        try:
            self.held = os.path.samestat(os.fstat(self._file), self.path.stat())
        except FileNotFoundError:  # its last holder has just removed it
            return False
        time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        words = f"process {os.getpid()} on {socket.gethostname()}, since {time}\n"
        with suppress(OSError):  # a full disk: the lock holds all the same
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, words.encode(), 0)
        return self.held

    def close(self) -> None:
        """Give it back, and leave no file."""
        if self.held:
            self.held = False
            with suppress(OSError):
                self.path.unlink()
        super().close()


def claim(path: Path) -> Claim | None:
    """Take what a file stands for; None if somebody has it, or is just giving it back.

    Raises:
        DiskError: the file cannot be made.
    """
    taken = Claim(path)
    if taken.settle():
        return taken
    taken.close()
    return None


def holder_of(path: Path) -> str | None:
    """Who has claimed what a file stands for: ``process 7 on there, since then``; None: nobody."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        said = os.pread(file, _MOST_WORDS, 0).decode("utf-8", "replace")
        return printable_line(said) or "another process"
    except OSError:
        return None
    finally:
        os.close(file)
    return None
