"""Text files as they come: plain or gzip, with or without a byte-order mark, whole or by line."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from sparsegrad_cli.errors import DataError

_GZIP = b"\x1f\x8b"
_BOM = b"\xef\xbb\xbf"


def read_text(path: Path) -> str:
    """The file as UTF-8, unpacked if it is gzip, without a byte-order mark; line ends untouched.

    Raises:
        DataError: it cannot be read, is a damaged gzip file, or is not UTF-8.
    """
    with _opened(path) as file:
        data = file.read()
    return _decoded(data.removeprefix(_BOM), "the file", str(path))


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number, line without its end) of a file, which is never in memory whole.

    Only ``\\n`` and ``\\r\\n`` end a line: a U+2028 inside a text does not.

    Raises:
        DataError: as read_text, naming the line.
    """
    with _opened(path) as file:
        for number, data in enumerate(file, start=1):
            data = data.removeprefix(_BOM) if number == 1 else data
            line = _decoded(data, "the line", f"{path}:{number}")
            yield number, line.removesuffix("\n").removesuffix("\r")


def is_text(value: str) -> bool:
    """False where a lone surrogate (half of a ``\\ud83d\\ude00`` pair) makes it no Unicode text."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _decoded(data: bytes, what: str, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{what} is not UTF-8: byte {data[error.start]:#04x} at offset {error.start}",
            where=where,
            fix="save it as UTF-8",
        ) from None


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes] | gzip.GzipFile]:
    """The file's bytes, unpacked where they begin like gzip whatever the name says."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_GZIP))
            file.seek(0)
            if start == _GZIP:
                with gzip.open(file) as unpacked:
                    yield unpacked
                return
            if start and path.suffix.lower() == ".gz":
                raise DataError(
                    "the file is not gzip, though its name says so",
                    where=str(path),
                    fix="unpacked text goes without .gz; a Git LFS pointer must be fetched first",
                )
            yield file
    except EOFError:
        raise DataError(
            "the gzip file is cut off before its end", where=str(path), fix="fetch it again"
        ) from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"the gzip file is damaged: {error}", where=str(path), fix="fetch it again"
        ) from None
    except OSError as error:
        raise DataError(
            f"the file cannot be read: {error.strerror or error}", where=str(path)
        ) from None
