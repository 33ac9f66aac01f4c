"""Read UTF-8 text files, plain or compressed, with or without a byte-order mark."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import IO

from sparsegrad_cli.data.compressed_files import open_decompressed
from sparsegrad_cli.errors import DataError

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# How files that are not text begin, and what to do with them.
_NOT_TEXT = (
    (codecs.BOM_UTF16_LE, "UTF-16", "save it as UTF-8"),
    (codecs.BOM_UTF16_BE, "UTF-16", "save it as UTF-8"),
    (codecs.BOM_UTF32_BE, "UTF-32", "save it as UTF-8"),
    (LFS_POINTER, "a Git LFS pointer", "fetch the file itself: git lfs pull"),
    (b"PAR1", "a Parquet file", "rename it to .parquet"),
    (b"ARROW1", "an Arrow file", "convert it to Parquet"),
    (b"FEA1", "a Feather file", "convert it to Parquet"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
    (b"Rar!\x1a", "a RAR archive", "unpack it"),
    (b"\x04\x22\x4d\x18", "an LZ4 file", "unpack it"),
    (b"SQLite format 3\0", "an SQLite database", "export the table as CSV or JSON lines"),
    (b"\xd0\xcf\x11\xe0", "an old Excel file", "export the sheet as CSV"),
)
_max_bytes: ContextVar[int | None] = ContextVar("max_bytes", default=None)


@contextmanager
def heads_only(size: int) -> Iterator[None]:
    """Make every text file end with the last whole line in its first ``size`` bytes."""
    token = _max_bytes.set(size)
    try:
        yield
    finally:
        _max_bytes.reset(token)


def read_text(path: Path) -> str:
    """Return a file as text without a byte-order mark; line ends stay as they are.

    Raises:
        DataError: the file cannot be read, cannot be decompressed, or is not UTF-8.
    """
    with open_decompressed(path) as file:
        data = _read(file)
    _check_start(data[:512], path)
    return _decode(data.removeprefix(codecs.BOM_UTF8), "the file", str(path))


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number, line without its end), reading one line at a time.

    Only ``\\n`` and ``\\r\\n`` end a line: a U+2028 inside a text does not.

    Raises:
        DataError: as :func:`read_text`; names the line.
    """
    with open_decompressed(path) as file:
        lines = file if _max_bytes.get() is None else io.BytesIO(_read(file))
        for number, data in enumerate(lines, start=1):
            if number == 1:
                _check_start(data[:512], path)
                data = data.removeprefix(codecs.BOM_UTF8)
            line = _decode(data, "the line", f"{path}:{number}")
            yield number, line.removesuffix("\n").removesuffix("\r")


def is_unicode(value: str) -> bool:
    """Return whether a string is valid Unicode: it holds no half of a surrogate pair."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _read(file: IO[bytes]) -> bytes:
    size = _max_bytes.get()
    if size is None:
        return file.read()
    data = file.read(size)
    return data if len(data) < size else data[: data.rfind(b"\n") + 1]


def _decode(data: bytes, what: str, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{what} is not UTF-8: byte {data[error.start]:#04x} at offset {error.start}",
            where=where,
            fix="save it as UTF-8",
        ) from None


def _check_start(start: bytes, path: Path) -> None:
    """Refuse a file that begins like another format than text."""
    for magic, what, fix in _NOT_TEXT:
        if start.startswith(magic):
            raise DataError(f"expected UTF-8 text, found {what}", where=str(path), fix=fix)
    if start[257:262] == b"ustar":
        raise DataError("expected text, found a tar archive", where=str(path), fix="unpack it")
    if start[:2].count(0) == 1:  # the first character of a UTF-16 file without a byte-order mark
        raise DataError(
            "expected UTF-8 text, found a NUL byte in its first character: is it UTF-16?",
            where=str(path),
            fix="save it as UTF-8",
        )
