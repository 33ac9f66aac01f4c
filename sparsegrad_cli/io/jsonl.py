"""JSON-lines files that grow while a command runs and that survive a kill.

Each line is written by one call and then synced, so a kill leaves at most one torn line, the last.
A reader recognizes it, and :class:`Journal` cuts it off.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
from pathlib import Path
from typing import Any

from sparsegrad_cli.errors import DiskError, FileFormatError, UsageError
from sparsegrad_cli.io.bounded_json import plain_json
from sparsegrad_cli.io.paths import make_folder

_KEPT = "free some space or check the permissions; the lines written before are kept"


def read_records(path: str | Path) -> tuple[list[dict[str, Any]], bytes]:
    """Read a JSON-lines file; skip blank lines.

    Returns:
        The objects, and the last line if it is torn (else empty). A last line that is a whole
        object counts although its line break is missing.

    Raises:
        UsageError: The file cannot be read.
        FileFormatError: A line before the last is not a JSON object; names the line.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    *lines, tail = content.split(b"\n")
    records = [
        _parse(line, f"{path}:{number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not tail.strip():
        return records, b""
    try:
        records.append(_parse(tail, str(path)))
    except FileFormatError:
        return records, tail
    return records, b""


def append_record(path: Path, record: dict[str, Any], *, fix: str = _KEPT) -> None:
    """Append one line to a file that this process alone writes; return once it is on disk.

    Args:
        path: The file; it is made if missing.
        record: A JSON object.
        fix: What the error advises.

    Raises:
        DiskError: The line cannot be written; no part of it stays in the file.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            _write_line(descriptor, json.dumps(record))
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _disk_error(path, error, fix) from error


class Journal:
    """Append records to a file that no other process may write to; use it as a context manager.

    Args:
        path: The file; it and its folder are made if missing.
        kind: The value of the key ``format``, with which every line begins.

    Attributes:
        records: The records in the file, without ``format``, in the order of writing.
        torn: Whether the file ended in a torn line, which has been cut off.

    Raises:
        UsageError: The file is not a regular file, or another process writes to it.
        FileFormatError: The file holds other lines, or a damaged one. It is left unchanged.
        DiskError: The file cannot be written.
    """

    def __init__(self, path: str | Path, kind: str) -> None:
        self.path, self._kind = Path(path), kind
        try:
            make_folder(self.path.parent)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise _disk_error(self.path, error, _KEPT) from error
        try:
            self._lock()
            self.records, tail = self._read()
            self.torn = bool(tail)
            self._end_with_line_break(tail)
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._file)  # This also releases the lock.

    def append(self, record: dict[str, Any]) -> None:
        """Write one record; it is on disk when this returns.

        Raises:
            DiskError: It cannot be written; no part of it stays in the file.
        """
        try:
            _write_line(self._file, json.dumps({"format": self._kind, **record}))
        except OSError as error:
            raise _disk_error(self.path, error, _KEPT) from error
        self.records.append(record)

    def _lock(self) -> None:
        """Lock the file itself: a lock on its folder would exclude the journals beside it."""
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            raise UsageError(f"{self.path} is not an ordinary file", where="--output")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"another process is writing to {self.path}",
                fix="wait for it, or name another --output",
            ) from error
        except OSError:
            return  # The file system has no locks.

    def _read(self) -> tuple[list[dict[str, Any]], bytes]:
        """Read our lines; refuse other files, since their last line must not be cut off."""
        try:
            records, tail = read_records(self.path)
        except FileFormatError as error:
            raise FileFormatError(
                error.what, where=error.where, fix="remove the line, or name another --output"
            ) from error
        beginning = json.dumps({"format": self._kind})[:-1].encode()
        ours = all(record.pop("format", None) == self._kind for record in records)
        if not ours or not (tail.startswith(beginning) or beginning.startswith(tail)):
            raise FileFormatError(
                f"expected lines of the format {self._kind}, found others",
                where=str(self.path),
                fix="name another --output",
            )
        return records, tail

    def _end_with_line_break(self, tail: bytes) -> None:
        size = os.fstat(self._file).st_size
        if tail:
            os.ftruncate(self._file, size - len(tail))
        elif size and os.pread(self._file, 1, size - 1) != b"\n":
            try:
                _write_line(self._file, "")
            except OSError as error:
                raise _disk_error(self.path, error, _KEPT) from error


def _parse(line: bytes, where: str) -> dict[str, Any]:
    """Parse one line of UTF-8, which may begin with a byte order mark."""
    try:
        found = plain_json(line)
    except ValueError as error:
        raise FileFormatError(f"the line is damaged: {error}", where=where) from error
    if not isinstance(found, dict):
        raise FileFormatError("expected a JSON object in every line", where=where)
    return found


def _write_line(descriptor: int, text: str) -> None:
    """Append and sync a line; if that fails, cut off what was written of it (OSError)."""
    line = text.encode() + b"\n"
    end = os.fstat(descriptor).st_size
    try:
        if os.write(descriptor, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(descriptor)
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, end)
        raise


def _disk_error(path: Path, error: OSError, fix: str) -> DiskError:
    return DiskError(
        f"cannot write {path.name}: {error.strerror or error}", where=str(path), fix=fix
    )
