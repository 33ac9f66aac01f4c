"""Files of one JSON object a line that grow while a command runs, and outlive its being killed.

A line is written by one call and then synchronised, so that a kill leaves at most one torn line,
the last. It is recognised, cut off, and what it was about is done again. Imports nothing heavy.
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


def read_records(path: str | Path) -> tuple[list[dict[str, Any]], bytes]:
    """The objects of a JSON-lines file, and what stands behind its last line break if that is torn.

    Blank lines are left out; a last line without a line break is read if it is whole.

    Raises:
        UsageError: it cannot be read.
        FileFormatError: a line before the last is no JSON object; says which.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error
    *lines, tail = content.split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            records.append(_object(line, f"{path}:{number}"))
    if not tail.strip():
        return records, b""
    try:
        records.append(_object(tail, str(path)))
    except FileFormatError:
        return records, tail
    return records, b""


def _object(line: bytes, where: str) -> dict[str, Any]:
    """One line. ``json`` takes utf-8 bytes, with a byte order mark too."""
    try:
        found = plain_json(line)
    except ValueError as error:
        raise FileFormatError(f"the line is damaged: {error}", where=where) from error
    if not isinstance(found, dict):
        raise FileFormatError("the line holds no JSON object", where=where)
    return found


class Journal:
    """A file of records that only grows; open, it belongs to one process. Use as a context.

    Args:
        path: the file; its folder and itself are made if missing.
        kind: what every line says first: ``{"format": kind, ...}``.

    Attributes:
        records: whole ones, in the order they were written.
        torn: the file ended in part of a line; it has been cut off.

    Raises:
        UsageError: it is no ordinary file, or another process is writing to it.
        FileFormatError: it holds something else, which is left as it is, or a damaged line.
        DiskError: it cannot be written.
    """

    def __init__(self, path: str | Path, kind: str) -> None:
        self.path, self._kind = Path(path), kind
        try:
            make_folder(self.path.parent)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            self._claim()
            self.records, tail = self._read()
            self.torn = bool(tail)
            self._mend(tail)
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._file)  # the lock goes with it

    def append(self, record: dict[str, Any]) -> None:
        """Write one record; it is on disk when this returns.

        Raises:
            DiskError: it could not be written; nothing of it is left.
        """
        self._write(json.dumps({"format": self._kind, **record}).encode() + b"\n")
        self.records.append(record)

    def _claim(self) -> None:
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            raise UsageError(f"{self.path} is no ordinary file", where="--output")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"another process is writing to {self.path}",
                fix="wait for it, or name another --output",
            ) from error
        except OSError:
            return  # a file system without locks

    def _read(self) -> tuple[list[dict[str, Any]], bytes]:
        """Only our own lines: a torn one is cut off, and somebody's notes must not be."""
        try:
            records, tail = read_records(self.path)
        except FileFormatError as error:
            raise FileFormatError(
                error.what, where=error.where, fix="take the line out, or name another --output"
            ) from error
        beginning = json.dumps({"format": self._kind})[:-1].encode()
        ours = all(record.pop("format", None) == self._kind for record in records)
        if not ours or not (tail.startswith(beginning) or beginning.startswith(tail)):
            raise FileFormatError(
                f"{self.path} holds something else than lines of {self._kind}",
                where=str(self.path),
                fix="name another --output",
            )
        return records, tail

    def _mend(self, tail: bytes) -> None:
        """End the file with a line break, without the torn line."""
        size = os.fstat(self._file).st_size
        if tail:
            os.ftruncate(self._file, size - len(tail))
        elif size and os.pread(self._file, 1, size - 1) != b"\n":
            self._write(b"\n")

    def _write(self, line: bytes) -> None:
        end = os.fstat(self._file).st_size
        try:
            if os.write(self._file, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, end)
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> DiskError:
        return DiskError(
            f"{self.path.name} could not be written: {error.strerror or error}",
            where=str(self.path),
            fix="free some space or check the permissions; what was there before is kept",
        )
