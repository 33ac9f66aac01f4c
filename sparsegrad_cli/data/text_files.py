"""Read UTF-8 text files, plain or compressed, with or without a byte-order mark.

A file is decompressed if it begins like a compressed file, whatever its name says.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from sparsegrad_cli.errors import DataError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst", ".zip")
# A file may decompress to this many bytes, and beyond that to this many times its own size, so
# that a small file cannot fill the memory.
MAX_BYTES = 256 * 2**20
MAX_RATIO = 200

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_CONVERT = "save it as UTF-8, or convert it: iconv -f {} -t UTF-8 OLD > NEW"
# How files that are not text begin, and what to do with them.
_NOT_TEXT = (
    (codecs.BOM_UTF16_LE, "UTF-16", _CONVERT.format("UTF-16")),
    (codecs.BOM_UTF16_BE, "UTF-16", _CONVERT.format("UTF-16")),
    (codecs.BOM_UTF32_BE, "UTF-32", _CONVERT.format("UTF-32")),
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
_NAMES = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd", ".zip": "zip"}
_MAGIC = (
    (b"\x1f\x8b", ".gz"),
    *((b"BZh%d" % level + mark, ".bz2") for level in range(1, 10) for mark in (b"1AY", b"\x17rE")),
    (b"\xfd7zXZ\x00", ".xz"),
    (b"\x28\xb5\x2f\xfd", ".zst"),
    (b"PK\x03\x04", ".zip"),
    (b"PK\x05\x06", ".zip"),
)
_CHUNK = 2**16  # compressed bytes that are read at a time


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
    _check_start(data[:512], str(path))
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        start = data.rfind(b"\n", 0, error.start) + 1
        raise _not_utf8(data[start:], error.start - start, f"{path}:{line}") from None


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number, line without its end), reading one line at a time.

    Only ``\\n`` and ``\\r\\n`` end a line: a U+2028 inside a text does not.

    Raises:
        DataError: as :func:`read_text`; names the line.
    """
    with open_decompressed(path) as file:
        yield from decoded_lines(
            file if _max_bytes.get() is None else io.BytesIO(_read(file)), str(path)
        )


def decoded_lines(lines: Iterable[bytes], name: str) -> Iterator[tuple[int, str]]:
    """Yield (line number, line without its end) of a binary stream, as :func:`text_lines` does.

    Args:
        lines: such as a binary file.
        name: of the stream, for errors.

    Raises:
        DataError: a line is not UTF-8.
    """
    for number, data in enumerate(lines, start=1):
        if number == 1:
            _check_start(data[:512], name)
            data = data.removeprefix(codecs.BOM_UTF8)
        try:
            line = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _not_utf8(data, error.start, f"{name}:{number}") from None
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


def _not_utf8(line: bytes, offset: int, where: str) -> DataError:
    """Return the error for a byte of a line."""
    return DataError(
        f"the text is not UTF-8: byte {line[offset]:#04x} at offset {offset} of the line",
        where=where,
        fix=f"{_CONVERT.format('WINDOWS-1252')}, if that is its encoding",
    )


def _check_start(start: bytes, name: str) -> None:
    """Refuse a file that begins like another format than text."""
    for magic, what, fix in _NOT_TEXT:
        if start.startswith(magic):
            raise DataError(f"expected UTF-8 text, found {what}", where=name, fix=fix)
    if start[257:262] == b"ustar":
        raise DataError("expected text, found a tar archive", where=name, fix="unpack it")
    if start[:2].count(0) == 1:  # the first character of a UTF-16 file without a byte-order mark
        raise DataError(
            "expected UTF-8 text, found a NUL byte in its first character: is it UTF-16?",
            where=name,
            fix=_CONVERT.format("UTF-16"),
        )


@contextmanager
def open_decompressed(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading; the stream's ``name`` is that of the member of a zip file.

    Raises:
        DataError: the file cannot be read, is damaged or cut off, or decompresses to far more than
            its own size; also while the stream is read.
    """
    suffix = path.suffix.lower()
    what = _NAMES.get(suffix, "file")
    try:
        with path.open("rb") as file:
            start = file.read(16)
            file.seek(0)
            compression = next((kind for magic, kind in _MAGIC if start.startswith(magic)), None)
            if compression is None:
                if start and suffix in _NAMES:
                    raise DataError(
                        f"the file is not {what}, though its name says so",
                        where=str(path),
                        fix=f"remove {suffix} from the name of a text file; fetch a Git LFS "
                        "pointer with git lfs pull",
                    )
                yield file
                return
            what = _NAMES[compression]
            with _decompressing(compression, file, path) as stream:
                yield io.BufferedReader(_Limited(stream, path))
    except EOFError:
        raise DataError(
            f"the {what} file is cut off before its end", where=str(path), fix="fetch it again"
        ) from None
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:
        raise _damaged(what, error, path) from None
    except OSError as error:
        if error.errno is None:  # an error of bz2 or zstd; the system's errors have a number
            raise _damaged(what, error, path) from None
        raise DataError(
            f"the file cannot be read: {error.strerror or error}", where=str(path)
        ) from None


def uncompressed_name(path: Path) -> str:
    """Return the file's name in lower case without the suffix of a compression.

    A zip file whose own name does not say what is in it (``data.zip``) has the name of its member.
    """
    name = path.name.lower()
    compression = next((suffix for suffix in COMPRESSIONS if name.endswith(suffix)), "")
    inner = name.removesuffix(compression)
    if compression == ".zip" and not Path(inner).suffix:
        with open_decompressed(path) as file:
            member = getattr(file, "name", None)
        return Path(member).name.lower() if isinstance(member, str) else inner
    return inner


def _damaged(what: str, error: Exception, path: Path) -> DataError:
    return DataError(f"the {what} file is damaged: {error}", where=str(path), fix="fetch it again")


def _decompressing(compression: str, file: IO[bytes], path: Path) -> IO[bytes]:
    if compression == ".gz":
        return cast(IO[bytes], gzip.open(file))
    if compression == ".bz2":
        return cast(IO[bytes], _Streams(file, bz2.BZ2Decompressor))
    if compression == ".xz":
        return cast(IO[bytes], _Streams(file, lzma.LZMADecompressor))
    if compression == ".zip":
        return _only_member(file, path)
    import pyarrow as pa

    if not pa.Codec.is_available("zstd"):
        raise DataError(
            "this installation of pyarrow cannot read zstd", where=str(path), fix="unpack the file"
        )
    stream: Any = pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")
    return cast(IO[bytes], stream)


def _only_member(file: IO[bytes], path: Path) -> IO[bytes]:
    """Open the one file in a zip file."""
    archive = zipfile.ZipFile(file)
    # macOS adds a folder of attributes.
    members = [
        each
        for each in archive.infolist()
        if not each.is_dir() and not each.filename.startswith("__MACOSX/")
    ]
    if len(members) != 1:
        names = ", ".join(each.filename for each in members[:5])
        raise DataError(
            f"expected one file in the zip file, found {len(members)}{': ' if names else ''}"
            f"{names}",
            where=str(path),
            fix="unpack it, and set task.path to the file or folder in it",
        )
    if members[0].filename.lower().endswith(COMPRESSIONS):
        raise DataError(
            f"the zip file holds a compressed file: {members[0].filename}",
            where=str(path),
            fix="unpack it",
        )
    try:
        return archive.open(members[0])
    except (RuntimeError, NotImplementedError) as error:  # a password, a rare compression
        raise DataError(
            f"the zip file cannot be unpacked: {error}", where=str(path), fix="unpack it yourself"
        ) from None


class _Streams(io.RawIOBase):
    """Decompress bzip2 or xz streams that follow each other; zero bytes between them are padding.

    ``bz2.open`` and ``lzma.open`` stop without an error at a later stream that is damaged, so that
    its rows would be lost in silence.
    """

    def __init__(
        self,
        file: IO[bytes],
        new_decompressor: Callable[[], bz2.BZ2Decompressor] | Callable[[], lzma.LZMADecompressor],
    ) -> None:
        super().__init__()
        self._file, self._new_decompressor = file, new_decompressor
        self._decompressor = new_decompressor()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer)
        while True:
            compressed = b""
            if self._decompressor.eof:
                compressed = self._decompressor.unused_data.lstrip(b"\0")
                while not compressed:
                    chunk = self._file.read(_CHUNK)
                    if not chunk:
                        return 0
                    compressed = chunk.lstrip(b"\0")
                self._decompressor = self._new_decompressor()
            elif self._decompressor.needs_input:
                compressed = self._file.read(_CHUNK)
                if not compressed:
                    raise EOFError
            data = self._decompressor.decompress(compressed, len(view))
            if data:
                view[: len(data)] = data
                return len(data)


class _Limited(io.RawIOBase):
    """Decompressed bytes, refused as soon as they are too many for the file's size."""

    def __init__(self, stream: IO[bytes], path: Path) -> None:
        super().__init__()
        self._stream, self._path = stream, path
        self._left = max(MAX_BYTES, MAX_RATIO * path.stat().st_size)
        self.name = getattr(stream, "name", None)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer)
        data = self._stream.read(len(view))
        self._left -= len(data)
        if self._left < 0:
            raise DataError(
                f"the file unpacks to more than {MAX_BYTES // 2**20} MiB and {MAX_RATIO} times its "
                "own size",
                where=str(self._path),
                fix="unpack it yourself if this is intended",
            )
        view[: len(data)] = data
        return len(data)
