"""Find the files of a split in a folder: one file or all its shards, of any format read here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from sparsegrad_cli.data.text_files import COMPRESSIONS
from sparsegrad_cli.errors import DataError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
TRAIN_STEMS = ("train",)
VALIDATION_STEMS = ("validation", "dev", "valid", "val")
PREFERRED = {
    "csv": (".csv", ".tsv"),
    "json": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet",),
}
# Files of data in formats that are not read: what they are, and what to do.
_CONVERT = "convert it to Parquet, JSON lines or CSV"
_UNREADABLE = {
    ".arrow": ("an Arrow file", _CONVERT),
    ".feather": ("a Feather file", _CONVERT),
    ".orc": ("an ORC file", _CONVERT),
    ".avro": ("an Avro file", _CONVERT),
    ".xlsx": ("an Excel file", "export the sheet as CSV"),
    ".xls": ("an Excel file", "export the sheet as CSV"),
    ".ods": ("a spreadsheet", "export the sheet as CSV"),
    ".sqlite": ("a database", "export the table as CSV or JSON lines"),
    ".db": ("a database", "export the table as CSV or JSON lines"),
    ".pkl": ("a pickle, which can run code", _CONVERT),
    ".pickle": ("a pickle, which can run code", _CONVERT),
    ".npy": ("a NumPy file", _CONVERT),
    ".npz": ("a NumPy file", _CONVERT),
    ".h5": ("an HDF5 file", _CONVERT),
    ".hdf5": ("an HDF5 file", _CONVERT),
    ".tar": ("an archive", "unpack it"),
    ".tgz": ("an archive", "unpack it"),
    ".7z": ("an archive", "unpack it"),
    ".rar": ("an archive", "unpack it"),
    ".lz4": ("compressed in a way that is not read here", "unpack it"),
    ".lzma": ("compressed in a way that is not read here", "unpack it"),
    ".br": ("compressed in a way that is not read here", "unpack it"),
    ".z": ("compressed in a way that is not read here", "unpack it"),
    ".sz": ("compressed in a way that is not read here", "unpack it"),
}
# Folders that may hold a data set's files beside its own.
_SPLIT_FOLDERS = ("data", *TRAIN_STEMS, *VALIDATION_STEMS)
_SHARD = re.compile(
    r"(?P<stem>.+?)[-_.](?P<index>\d+)[-_]of[-_](?P<count>\d+)(?:[-_.][0-9a-z]+)*", re.IGNORECASE
)


@dataclass(frozen=True)
class _Named:
    """What a file's name says.

    Attributes:
        stem: ``train`` of train-00000-of-00002.csv.gz, in lower case.
        suffix: ``.csv``, in lower case.
        packing: ``.gz``, in lower case; "" where there is none.
        shard: (0, 2); None for a file that is no shard.
    """

    path: Path
    stem: str
    suffix: str
    packing: str
    shard: tuple[int, int] | None


def find_split(
    folder: Path, stems: Sequence[str], suffixes: Sequence[str] = SUFFIXES
) -> list[Path]:
    """Return the files of one split: ``stem.suffix``, or its shards ``stem-00000-of-00002.suffix``.

    Each may be compressed (``.gz``, ...). Stems and suffixes are tried in order, and the first that
    is there wins; upper and lower case are the same. Empty when none is.

    Raises:
        DataError: a shard is missing or there twice, shards are of two sets, there is a whole file
            as well as shards, or the split is there in an unreadable format only.
    """
    named = _files(folder) if folder.is_dir() else []
    for stem in stems:
        found = [each for each in named if each.stem == stem]
        for suffix in suffixes:
            files = [each for each in found if each.suffix == suffix]
            if files:
                _check_one_set(found, stem, folder)
                return _whole(files, stem, folder)
        # train.zip and train.gz do not say what is in them.
        bare = [each for each in found if not each.suffix and each.packing]
        if bare:
            return [bare[0].path]
    for each in named:
        if each.stem in stems and each.suffix in _UNREADABLE:
            raise unreadable(each.path)
    return []


def split_folder(folder: Path, suffixes: Sequence[str] = SUFFIXES) -> Path:
    """Return the folder itself, or its ``data/`` where only that holds training files.

    Data sets of the hub keep their files in ``data/``.
    """
    inner = folder / "data"
    if inner.is_dir() and not find_split(folder, TRAIN_STEMS, suffixes):
        return inner if find_split(inner, TRAIN_STEMS, suffixes) else folder
    return folder


def unread_note(folder: Path, files: Sequence[Path], without: Sequence[str] = ()) -> list[str]:
    """Return a note that names the data files of a folder that are not among ``files``.

    Files of a split in the folder's own folders (``data/``, ``validation/``) count among them.

    Args:
        folder: of the data.
        files: those that are read.
        without: stems of files that are left out of the note, in lower case.
    """
    inner = sorted(p for p in folder.iterdir() if p.is_dir() and p.name.lower() in _SPLIT_FOLDERS)
    left = [each.path for place in (folder, *inner) for each in _files(place) if _is_data(each)]
    left = [path for path in left if path not in files and not _is_about_data(path)]
    left = [path for path in left if _named(path).stem not in without]
    names = [str(path.relative_to(folder)) for path in left]
    if not names:
        return []
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    read = f"{', '.join(file.name for file in files[:5])}{', ...' if len(files) > 5 else ''}"
    return [f"not read in {folder}: {', '.join(names[:5])}{more}; read: {read}"]


def lone_shard_note(path: Path) -> list[str]:
    """Return a note where a file that is read by itself is one shard of several."""
    shard = _named(path).shard
    if shard is None or shard[1] < 2:
        return []
    return [
        f"{path.name} is one of {shard[1]} shards and is read by itself; to read all of them, let "
        "task.path be the folder"
    ]


def no_training_file(folder: Path, suffixes: Sequence[str] = SUFFIXES) -> DataError:
    """Return the error for a folder without a training file."""
    for inner in (folder, folder / "train", folder / "data"):
        for each in _files(inner) if inner.is_dir() else []:
            if each.suffix in _UNREADABLE and each.stem in ("data", *TRAIN_STEMS):
                return unreadable(each.path)
    return DataError(
        "the folder has no training file",
        where=str(folder),
        fix=f"looked for: {looked_for(TRAIN_STEMS, suffixes)}; or let task.path be the file itself",
    )


def unreadable(path: Path) -> DataError:
    """Return the error for a file in a format that is not read."""
    what, fix = _UNREADABLE[_named(path).suffix]
    return DataError(f"{path.name} is {what}, which cannot be read", where=str(path), fix=fix)


def is_unreadable(path: Path) -> bool:
    """True where the file's suffix is that of data in a format that is not read."""
    return _named(path).suffix in _UNREADABLE


def looked_for(stems: Sequence[str], suffixes: Sequence[str] = SUFFIXES) -> str:
    """Return the names that find_split tries, for an error message."""
    names = [f"{stem}{suffix}" for stem in stems for suffix in suffixes]
    names.append(f"{stems[0]}-00000-of-00002.* and so on")
    return f"{', '.join(names)}, each also with {', '.join(COMPRESSIONS)}"


def _is_data(named: _Named) -> bool:
    """True for a file in a format of data, or named like a split (train.zip, validation.txt)."""
    if named.suffix:
        return True
    stem = named.path.name.lower().removesuffix(named.packing).removesuffix(".txt")
    return stem in (*TRAIN_STEMS, *VALIDATION_STEMS)


def _is_about_data(path: Path) -> bool:
    """True for files of settings that the datasets library leaves beside data."""
    return path.name.lower().startswith(("dataset_", "state.json"))


def _files(folder: Path) -> list[_Named]:
    """Return what the names of a folder's files say, plain ones before compressed ones.

    Raises:
        DataError: what is named like a file of a split is a broken link, a folder or a pipe.
    """
    found = []
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_file():
            found.append(path)
        elif _named(path).suffix and _named(path).stem in (*TRAIN_STEMS, *VALIDATION_STEMS):
            kind = "a folder" if path.is_dir() else "a broken link, or a pipe or device"
            raise DataError(
                f"Expected a file named {path.name}, got {kind}",
                where=str(path),
                fix="put the file there, or rename what is there",
            )
    return sorted(map(_named, found), key=lambda each: (bool(each.packing), each.path.name))


def _named(path: Path) -> _Named:
    name = path.name.lower()
    packing = next((suffix for suffix in COMPRESSIONS if name.endswith(suffix)), "")
    name = name.removesuffix(packing)
    suffix = next((s for s in (*SUFFIXES, *_UNREADABLE) if name.endswith(s)), "")
    stem = name.removesuffix(suffix)
    if suffix in _UNREADABLE:  # train.csv.7z
        stem = stem.removesuffix(next((s for s in SUFFIXES if stem.endswith(s)), ""))
    match = _SHARD.fullmatch(stem)
    if not match:
        return _Named(path, stem, suffix, packing, None)
    return _Named(path, match["stem"], suffix, packing, (int(match["index"]), int(match["count"])))


def _check_one_set(found: Sequence[_Named], stem: str, folder: Path) -> None:
    """Raise a DataError where shards of a split, of whatever format, are of several sets."""
    sets = sorted({each.shard[1] for each in found if each.shard})
    if len(sets) > 1:
        names = [next(e.path.name for e in found if e.shard and e.shard[1] == n) for n in sets]
        raise DataError(
            f"the shards of {stem} belong to several sets, of {' and '.join(map(str, sets))} "
            f"files: {', '.join(names)}",
            where=str(folder),
            fix="remove the files of the older set",
        )


def _whole(files: list[_Named], stem: str, folder: Path) -> list[Path]:
    """Return the one whole file, or all shards in order."""
    shards = [each for each in files if each.shard]
    whole = [each.path for each in files if not each.shard]
    if not shards:
        return whole[:1]
    if whole:
        raise DataError(
            f"the folder has {whole[0].name} as well as shards of {stem}: {shards[0].path.name}",
            where=str(folder),
            fix="remove the one or the others",
        )
    count = shards[0].shard[1] if shards[0].shard else 0
    by_index: dict[int, Path] = {}
    for each in shards:
        index = each.shard[0] if each.shard else 0
        if index in by_index:
            raise DataError(
                f"shard {index} of {count} of {stem} is there twice: {by_index[index].name}, "
                f"{each.path.name}",
                where=str(folder),
                fix="remove the older one",
            )
        by_index[index] = each.path
    # Counted from 0, as on the hub, or from 1.
    first = 0 if 0 in by_index or count not in by_index else 1
    absent = (index for index in range(first, first + count) if index not in by_index)
    missing = list(islice(absent, 20))
    beyond = [index for index in by_index if not first <= index < first + count]
    if missing or beyond:
        what = f"shard {missing[0]} of {count} of {stem} is not there" if missing else ""
        if len(missing) > 1:
            what = f"shards {', '.join(map(str, missing))} of {count} of {stem} are not there"
        if not missing:
            what = f"shard {beyond[0]} of {stem} is beyond its {count} shards"
        raise DataError(
            f"{what}; found: {', '.join(path.name for path in list(by_index.values())[:5])}",
            where=str(folder),
            fix="put the missing files back; where these rows are all there is, merge them into "
            f"{stem}{files[0].suffix}",
        )
    return [by_index[index] for index in sorted(by_index)]
