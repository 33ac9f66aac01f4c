"""Read text files: plain or compressed, with or without a byte-order mark, whole or by line."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import IO, Any

from sparsegrad_cli.errors import DataError

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst", ".zip")

_NAMES = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd", ".zip": "zip"}
_MAGIC = (
    (b"\x1f\x8b", ".gz"),
    *((b"BZh%d" % level + mark, ".bz2") for level in range(1, 10) for mark in (b"1AY", b"\x17rE")),
    (b"\xfd7zXZ\x00", ".xz"),
    (b"\x28\xb5\x2f\xfd", ".zst"),
    (b"PK\x03\x04", ".zip"),
    (b"PK\x05\x06", ".zip"),
)
_BOM = codecs.BOM_UTF8
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# How files begin that are not text, and what to do with them.
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
# A file may unpack to this many bytes, and beyond that to this many times its own size: so small
# files cannot fill the memory.
UNPACKED_BYTES = 256 * 2**20
UNPACKED_RATIO = 200
_CHUNK = 2**16  # bytes of a packed file that are read at a time


_head: ContextVar[int | None] = ContextVar("head", default=None)


@contextmanager
def heads_only(size: int) -> Iterator[None]:
    """Inside, a text file ends with the last whole line in its first ``size`` bytes."""
    token = _head.set(size)
    try:
        yield
    finally:
        _head.reset(token)


def _read(file: IO[bytes]) -> bytes:
    size = _head.get()
    if size is None:
        return file.read()
    data = file.read(size)
    return data if len(data) < size else data[: data.rfind(b"\n") + 1]


def read_text(path: Path) -> str:
    """Return the file as text, unpacked, without a byte-order mark; line ends stay as they are.

    Raises:
        DataError: the file cannot be read, cannot be unpacked, or is not UTF-8.
    """
    with _opened(path) as file:
        data = _read(file)
    _check_beginning(data[:512], path)
    return _decoded(data.removeprefix(_BOM), "the file", str(path))


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number, line without its end), reading one line at a time.

    Only ``\\n`` and ``\\r\\n`` end a line: a U+2028 inside a text does not.

    Raises:
        DataError: as read_text, naming the line.
    """
    with _opened(path) as file:
        lines = file if _head.get() is None else io.BytesIO(_read(file))
        for number, data in enumerate(lines, start=1):
            if number == 1:
                _check_beginning(data[:512], path)
                data = data.removeprefix(_BOM)
            line = _decoded(data, "the line", f"{path}:{number}")
            yield number, line.removesuffix("\n").removesuffix("\r")


def is_text(value: str) -> bool:
    """False where a lone surrogate (half of a ``\\ud83d\\ude00`` pair) makes it no Unicode text."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def unpacked_name(path: Path) -> str:
    """Return the file's name in lower case without the suffix of a compression.

    A zip file whose own name does not say what is in it (``data.zip``) has the name of its member.
    """
    name = path.name.lower()
    packing = next((suffix for suffix in COMPRESSIONS if name.endswith(suffix)), "")
    inner = name.removesuffix(packing)
    if packing == ".zip" and not Path(inner).suffix:
        with _opened(path) as file:
            member = getattr(file, "name", None)
        return Path(member).name.lower() if isinstance(member, str) else inner
    return inner


def _decoded(data: bytes, what: str, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{what} is not UTF-8: byte {data[error.start]:#04x} at offset {error.start}",
            where=where,
            fix="save it as UTF-8",
        ) from None


def _check_beginning(start: bytes, path: Path) -> None:
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


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Open the file's bytes, unpacked where they begin like a compressed file, whatever its name.

    The stream's ``name`` is that of the zip file's member.
    """
    named = path.suffix.lower()
    what = _NAMES.get(named, "file")
    try:
        with path.open("rb") as file:
            start = file.read(16)
            file.seek(0)
            packing = next((kind for magic, kind in _MAGIC if start.startswith(magic)), None)
            if packing is None:
                if start and named in _NAMES:
                    raise DataError(
                        f"the file is not {what}, though its name says so",
                        where=str(path),
                        fix=f"unpacked text goes without {named}; a Git LFS pointer must be "
                        "fetched first",
                    )
                yield file
                return
            what = _NAMES[packing]
            size = path.stat().st_size
            with _unpacking(packing, file, path) as unpacked:
                yield io.BufferedReader(_Bounded(unpacked, size, path))
    except EOFError:
        raise DataError(
            f"the {what} file is cut off before its end", where=str(path), fix="fetch it again"
        ) from None
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:
        raise _damaged(what, error, path) from None
    except OSError as error:
        if error.errno is None:  # of bz2 and zstd; the system's errors have a number
            raise _damaged(what, error, path) from None
        raise DataError(
            f"the file cannot be read: {error.strerror or error}", where=str(path)
        ) from None


def _damaged(what: str, error: Exception, path: Path) -> DataError:
    return DataError(f"the {what} file is damaged: {error}", where=str(path), fix="fetch it again")


def _unpacking(packing: str, file: IO[bytes], path: Path) -> Any:
    if packing == ".gz":
        return gzip.open(file)
    if packing == ".bz2":
        return _Streams(file, bz2.BZ2Decompressor)
    if packing == ".xz":
        return _Streams(file, lzma.LZMADecompressor)
    if packing == ".zip":
        return _only_member(file, path)
    import pyarrow as pa

    if not pa.Codec.is_available("zstd"):
        raise DataError(
            "this installation of pyarrow cannot read zstd", where=str(path), fix="unpack the file"
        )
    return pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")


def _only_member(file: IO[bytes], path: Path) -> IO[bytes]:
    """Open the one file in a zip file.

    Raises:
        DataError: it holds another number of files, or one that cannot be unpacked here.
    """
    archive = zipfile.ZipFile(file)
    # macOS puts a folder of attributes beside the files.
    found = [each for each in archive.infolist() if not each.is_dir()]
    found = [each for each in found if not each.filename.startswith("__MACOSX/")]
    if len(found) != 1:
        names = ", ".join(each.filename for each in found[:5])
        raise DataError(
            f"expected one file in the zip file, found {len(found)}{': ' if names else ''}{names}",
            where=str(path),
            fix="unpack it, and let task.path be the file or folder in it",
        )
    if found[0].filename.lower().endswith(COMPRESSIONS):
        raise DataError(
            f"the zip file holds a compressed file: {found[0].filename}",
            where=str(path),
            fix="unpack it",
        )
    try:
        return archive.open(found[0])
    except (RuntimeError, NotImplementedError) as error:  # a password, a rare compression
        raise DataError(
            f"the zip file cannot be unpacked: {error}", where=str(path), fix="unpack it yourself"
        ) from None


class _Streams(io.RawIOBase):
    """Unpack bzip2 or xz streams, one after another.

    The readers of the standard library stop without an error at a later stream that is damaged,
    and so lose its rows. Zero bytes between and after streams are padding.

    Args:
        file: the packed bytes.
        stream: makes the decompressor of one stream.
    """

    def __init__(
        self,
        file: IO[bytes],
        stream: Callable[[], bz2.BZ2Decompressor] | Callable[[], lzma.LZMADecompressor],
    ) -> None:
        super().__init__()
        self._file, self._new_stream = file, stream
        self._stream = stream()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            packed = b""
            if self._stream.eof:
                packed = self._stream.unused_data.lstrip(b"\0")
                while not packed:
                    chunk = self._file.read(_CHUNK)
                    if not chunk:
                        return 0
                    packed = chunk.lstrip(b"\0")
                self._stream = self._new_stream()
            elif self._stream.needs_input:
                packed = self._file.read(_CHUNK)
                if not packed:
                    raise EOFError
            data = self._stream.decompress(packed, len(buffer))
            if data:
                buffer[: len(data)] = data
                return len(data)


class _Bounded(io.RawIOBase):
    """Unpacked bytes, refused as soon as they are far too many for the file's size."""

    def __init__(self, unpacked: IO[bytes], size: int, path: Path) -> None:
        super().__init__()
        self._unpacked, self._path = unpacked, path
        self._left = max(UNPACKED_BYTES, UNPACKED_RATIO * size)
        self.name = getattr(unpacked, "name", None)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._unpacked.read(len(buffer))
        self._left -= len(data)
        if self._left < 0:
            raise DataError(
                f"the file unpacks to more than {UNPACKED_BYTES // 2**20} MiB and {UNPACKED_RATIO} "
                "times its own size",
                where=str(self._path),
                fix="unpack it yourself if it is meant to be so",
            )
        buffer[: len(data)] = data
        return len(data)
