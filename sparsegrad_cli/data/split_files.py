"""Find the files of a training and a validation split in a folder.

A split is one file (``train.csv``) or all of its shards (``train-00000-of-00002.csv``), in any
format that is read, plain or compressed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from sparsegrad_cli.data.text_files import COMPRESSIONS
from sparsegrad_cli.errors import DataError
from sparsegrad_cli.io.suggest import listed

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
SUFFIXES_OF = {
    "csv": (".csv", ".tsv"),
    "json": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet",),
}
TRAIN_NAMES = ("train",)
VALIDATION_NAMES = ("validation", "dev", "valid", "val")
# Suffixes of data in formats that are not read: what such a file is, and what to do.
_CONVERT = "convert it to Parquet, JSON lines or CSV"
_EXPORT_SHEET, _EXPORT_TABLE = "export the sheet as CSV", "export the table as CSV or JSON lines"
_UNREADABLE = {
    ".arrow": ("an Arrow file", _CONVERT),
    ".feather": ("a Feather file", _CONVERT),
    ".orc": ("an ORC file", _CONVERT),
    ".avro": ("an Avro file", _CONVERT),
    ".pkl": ("a pickle, which can run code", _CONVERT),
    ".pickle": ("a pickle, which can run code", _CONVERT),
    **dict.fromkeys((".npy", ".npz"), ("a NumPy file", _CONVERT)),
    **dict.fromkeys((".h5", ".hdf5"), ("an HDF5 file", _CONVERT)),
    **dict.fromkeys((".xlsx", ".xls"), ("an Excel file", _EXPORT_SHEET)),
    ".ods": ("a spreadsheet", _EXPORT_SHEET),
    **dict.fromkeys((".sqlite", ".db"), ("a database", _EXPORT_TABLE)),
    **dict.fromkeys((".tar", ".tgz", ".7z", ".rar"), ("an archive", "unpack it")),
    **dict.fromkeys(
        (".lz4", ".lzma", ".br", ".z", ".sz"),
        ("compressed in a format that is not supported", "unpack it"),
    ),
}
# Subfolders that may hold files of a data set.
_SUBFOLDERS = ("data", *TRAIN_NAMES, *VALIDATION_NAMES)
_SHARD = re.compile(
    r"(?P<stem>.+?)[-_.](?P<index>\d+)[-_]of[-_](?P<count>\d+)(?:[-_.][0-9a-z]+)*", re.IGNORECASE
)


@dataclass(frozen=True)
class SplitFiles:
    """The files to read. ``validation`` is empty if the data has no validation part."""

    train: list[Path]
    validation: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _File:
    """A file and the parts of its name, for example ``train-00000-of-00002.csv.gz``.

    Attributes:
        path: the file.
        stem: ``train``, in lower case.
        suffix: ``.csv``; "" if the name has none that is known.
        compression: ``.gz``; "" if the file is not compressed by its name.
        shard: (index, count), here (0, 2); None for a file that is not a shard.
    """

    path: Path
    stem: str
    suffix: str
    compression: str
    shard: tuple[int, int] | None


def split_files(path: Path, suffixes: Sequence[str]) -> SplitFiles:
    """Return the files that a path stands for: itself, or the splits of a folder.

    Args:
        path: a file, or a folder that holds the splits itself or in its ``data/``.
        suffixes: formats, the preferred one first.

    Raises:
        DataError: the path does not exist, the folder has no training file, or as
            :func:`find_split`.
    """
    if path.is_file():
        return SplitFiles([path], notes=_single_shard_notes(path))
    if not path.is_dir():
        raise DataError(f"no such file or folder: {path}", where="task.path")
    folder = path
    train = find_split(folder, TRAIN_NAMES, suffixes)
    if not train and (path / "data").is_dir():
        folder = path / "data"
        train = find_split(folder, TRAIN_NAMES, suffixes)
    if not train:
        raise _no_training_file(path, suffixes)
    validation = find_split(folder, VALIDATION_NAMES, suffixes)
    return SplitFiles(train, validation, unread_notes(path, [*train, *validation]))


def find_split(folder: Path, stems: Sequence[str], suffixes: Sequence[str]) -> list[Path]:
    """Return the files of one split: ``stem.suffix``, or all of its shards in order.

    Stems and suffixes are tried in order, and the first that exists is taken. Case is ignored.
    The result is empty if the folder does not exist or has no such file.

    Raises:
        DataError: a shard is missing or there twice, the shards belong to two sets, there are a
            whole file and shards, or the split exists only in a format that is not read.
    """
    files = _files(folder) if folder.is_dir() else []
    for stem in stems:
        same_stem = [each for each in files if each.stem == stem]
        for suffix in suffixes:
            found = [each for each in same_stem if each.suffix == suffix]
            if found:
                _check_one_set(same_stem, stem, folder)
                return _whole_split(found, stem, folder)
        # The names train.zip and train.gz do not say which format is inside.
        unnamed = [each for each in same_stem if not each.suffix and each.compression]
        if unnamed:
            return [unnamed[0].path]
    for each in files:
        if each.stem in stems and each.suffix in _UNREADABLE:
            raise unreadable(each.path)
    return []


def unread_notes(folder: Path, files: Sequence[Path], ignored: Sequence[str] = ()) -> list[str]:
    """Return a note that names the data files of a folder that are not read.

    Data files in subfolders named like a split, or in ``data/``, count too.

    Args:
        folder: folder of the data.
        files: the files that are read.
        ignored: stems (in lower case) of files that the note leaves out.
    """
    inner = sorted(p for p in folder.iterdir() if p.is_dir() and p.name.lower() in _SUBFOLDERS)
    left = [each for place in (folder, *inner) for each in _files(place) if _is_data(each)]
    left = [each for each in left if each.path not in files and each.stem not in ignored]
    names = [str(each.path.relative_to(folder)) for each in left]
    if not names:
        return []
    read = listed([file.name for file in files], 5)
    return [f"not read in {folder}: {listed(names, 5)}; read: {read}"]


def refuse_unreadable(path: Path) -> None:
    """Refuse a file whose suffix is that of a format that is not read.

    Raises:
        DataError: says what the file is and how to convert it.
    """
    if _parse_name(path).suffix in _UNREADABLE:
        raise unreadable(path)


def unreadable(path: Path) -> DataError:
    """Return the error for a file in a format that is not read."""
    what, fix = _UNREADABLE[_parse_name(path).suffix]
    return DataError(f"{path.name} is {what}, which cannot be read", where=str(path), fix=fix)


def tried_names(stems: Sequence[str], suffixes: Sequence[str]) -> str:
    """Return the names that :func:`find_split` tries, for an error message."""
    names = [f"{stem}{suffix}" for stem in stems for suffix in suffixes]
    names.append(f"{stems[0]}-00000-of-00002.* and so on")
    return f"{', '.join(names)}, each also with {', '.join(COMPRESSIONS)}"


def _single_shard_notes(path: Path) -> list[str]:
    shard = _parse_name(path).shard
    if shard is None or shard[1] < 2:
        return []
    return [
        f"{path.name} is one of {shard[1]} shards and is read alone; to read all shards, set "
        "task.path to the folder"
    ]


def _no_training_file(folder: Path, suffixes: Sequence[str]) -> DataError:
    for inner in (folder, folder / "train", folder / "data"):
        for each in _files(inner) if inner.is_dir() else []:
            if each.suffix in _UNREADABLE and each.stem in ("data", *TRAIN_NAMES):
                return unreadable(each.path)
    return DataError(
        "the folder has no training file",
        where=str(folder),
        fix=f"tried: {tried_names(TRAIN_NAMES, suffixes)}; or set task.path to the file itself",
    )


def _is_data(file: _File) -> bool:
    """Return whether a file is data by its suffix, or is named like a split."""
    # The datasets library leaves these beside the data that it saves.
    if file.path.name.lower().startswith(("dataset_", "state.json")):
        return False
    return bool(file.suffix) or file.stem.removesuffix(".txt") in (*TRAIN_NAMES, *VALIDATION_NAMES)


def _files(folder: Path) -> list[_File]:
    """Return the files of a folder, uncompressed ones first; refuse a folder named like a split."""
    found = []
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        file = _parse_name(path)
        if path.is_file():
            found.append(file)
        elif file.suffix and file.stem in (*TRAIN_NAMES, *VALIDATION_NAMES):
            kind = "a folder" if path.is_dir() else "a broken link, or a pipe or device"
            raise DataError(
                f"Expected a file named {path.name}, got {kind}",
                where=str(path),
                fix="put the file there, or rename what is there",
            )
    return sorted(found, key=lambda each: (bool(each.compression), each.path.name))


def _parse_name(path: Path) -> _File:
    name = path.name.lower()
    compression = next((suffix for suffix in COMPRESSIONS if name.endswith(suffix)), "")
    name = name.removesuffix(compression)
    suffix = next((s for s in (*SUFFIXES, *_UNREADABLE) if name.endswith(s)), "")
    stem = name.removesuffix(suffix)
    if suffix in _UNREADABLE:  # train.csv.7z
        stem = stem.removesuffix(next((s for s in SUFFIXES if stem.endswith(s)), ""))
    match = _SHARD.fullmatch(stem)
    if not match:
        return _File(path, stem, suffix, compression, None)
    shard = int(match["index"]), int(match["count"])
    return _File(path, match["stem"], suffix, compression, shard)


def _check_one_set(files: Sequence[_File], stem: str, folder: Path) -> None:
    """Refuse shards of several sets, such as ``-of-2`` beside ``-of-3``."""
    first_of = {each.shard[1]: each.path.name for each in reversed(files) if each.shard}
    if len(first_of) > 1:
        counts = sorted(first_of)
        raise DataError(
            f"the shards of {stem} belong to several sets, of {' and '.join(map(str, counts))} "
            f"files: {', '.join(first_of[count] for count in counts)}",
            where=str(folder),
            fix="remove the files of the older set",
        )


def _whole_split(files: Sequence[_File], stem: str, folder: Path) -> list[Path]:
    """Return the one whole file, or all shards in order."""
    whole = [each.path for each in files if not each.shard]
    shards = [(*each.shard, each.path) for each in files if each.shard]
    if not shards:
        return whole[:1]
    if whole:
        raise DataError(
            f"the folder has {whole[0].name} as well as shards of {stem}: {shards[0][2].name}",
            where=str(folder),
            fix="remove either the file or the shards",
        )
    count = shards[0][1]
    by_index: dict[int, Path] = {}
    for index, _, path in shards:
        if index in by_index:
            raise DataError(
                f"shard {index} of {count} of {stem} is there twice: {by_index[index].name}, "
                f"{path.name}",
                where=str(folder),
                fix="remove the older one",
            )
        by_index[index] = path
    # Shards are counted from 0, as on the hub, or from 1.
    first = 0 if 0 in by_index or count not in by_index else 1
    expected = range(first, first + count)
    missing = list(islice((index for index in expected if index not in by_index), 20))
    beyond = [index for index in by_index if index not in expected]
    if missing or beyond:
        if len(missing) > 1:
            what = f"shards {', '.join(map(str, missing))} of {count} of {stem} are not there"
        elif missing:
            what = f"shard {missing[0]} of {count} of {stem} is not there"
        else:
            what = f"shard {beyond[0]} of {stem} is beyond its {count} shards"
        raise DataError(
            f"{what}; found: {', '.join(path.name for path in list(by_index.values())[:5])}",
            where=str(folder),
            fix="restore the missing files; if these rows are all of the data, merge them into "
            f"{stem}{files[0].suffix}",
        )
    return [by_index[index] for index in sorted(by_index)]
