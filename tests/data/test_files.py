"""Data files: shards, compression, separators, long texts, unused columns."""

from __future__ import annotations

import bz2
import csv
import datetime
import gzip
import json
import lzma
import zipfile
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from support.oasst_samples import node, tree, write
from support.task_data import load_chat, load_task

from sparsegrad_cli.data import text_files
from sparsegrad_cli.data.examples import TextData
from sparsegrad_cli.data.read_table import read_table
from sparsegrad_cli.errors import DataError, UsageError

ROWS = [(f"row {number}, of ten", "ab"[number % 2]) for number in range(10)]
CSV = "text,label\n" + "".join(f'"{text}",{label}\n' for text, label in ROWS)
BARE = "text,label\n" + "".join(f"row {number},{'ab'[number % 2]}\n" for number in range(4))
JSONL = "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in ROWS)


def texts(task: TextData) -> list[str]:
    """Return all texts of both splits of a task, sorted."""
    return sorted([*task.train["text"], *task.validation["validation"]["text"]])


ALL = sorted(text for text, _ in ROWS)


def put(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def zstd(content: bytes) -> bytes:
    import pyarrow as pa

    packed: bytes = pa.Codec("zstd").compress(content, asbytes=True)
    return packed


def zipped(content: bytes, *names: str) -> bytes:
    import io

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names or ("inside",):
            archive.writestr(name, content)
    return buffer.getvalue()


PACKING: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
    ".zip": zipped,
}


# --- shards


def shards(folder: Path, *names: str) -> Path:
    """Write files of two rows each; all texts differ."""
    for name in names:
        put(folder / name, f"text,label\n{name} one,a\n{name} two,b\n")
    return folder


@pytest.mark.parametrize(
    "names",
    [
        ("train-00000-of-00002.csv", "train-00001-of-00002.csv"),
        ("train-00000-of-00002-a09b.csv", "train-00001-of-00002-17cc.csv"),
        ("train-1-of-2.csv", "train-2-of-2.csv"),
        ("train.00000-of-00002.csv", "train.00001-of-00002.csv"),
        ("train_0_of_2.csv", "train_1_of_2.csv"),
        ("TRAIN-00000-of-00002.CSV", "TRAIN-00001-of-00002.CSV"),
    ],
)
def test_all_shards_are_read_in_order(tmp_path: Path, names: tuple[str, str]) -> None:
    shards(tmp_path, *names, "validation.csv")
    task = load_task("csv", path=tmp_path)
    assert list(task.train["text"]) == [f"{name} {n}" for name in names for n in ("one", "two")]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("train-00000-of-00003.csv", "train-00002-of-00003.csv"), "shard 1 of 3 of train is not"),
        (("train-00000-of-00003.csv",), "shards 1, 2 of 3 of train are not there"),
        (("train-1-of-3.csv", "train-3-of-3.csv"), "shard 2 of 3 of train is not there"),
        (("train-0-of-99999999999999.csv",), "shards 1, 2, 3, .* are not there"),
        (("train.csv", "dev-00001-of-00002.csv"), "shard 0 of 2 of dev is not there"),
        (
            ("train-00000-of-00001.csv", "train-00000-of-00002.csv", "train-00001-of-00002.csv"),
            "shards of train belong to several sets, of 1 and 2 files",
        ),
        (
            ("train-00000-of-00001.csv", "train-00000-of-00002.jsonl"),
            "shards of train belong to several sets",
        ),
        (
            ("train-00000-of-00001-old.csv", "train-00000-of-00001-new.csv"),
            "shard 0 of 1 of train is there twice",
        ),
        (
            ("train-00000-of-00001.csv", "train-00000-of-00001.csv.gz"),
            "shard 0 of 1 of train is there twice",
        ),
        (
            ("train-00000-of-00002.csv", "train-00001-of-00002.csv", "train-00002-of-00002.csv"),
            "shard 2 of train is beyond its 2 shards",
        ),
        (("train.csv", "train-00000-of-00001.csv"), "train.csv as well as shards of train"),
    ],
)
def test_shards_that_are_not_one_set_are_refused(
    tmp_path: Path, names: tuple[str, ...], message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_task("csv", path=shards(tmp_path, *names))
    assert names[0].partition(".")[0] in str(caught.value) or "dev" in message
    assert caught.value.where == str(tmp_path) and caught.value.fix


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "parquet", "tsv", "json"])
def test_a_missing_shard_is_refused_in_every_format(tmp_path: Path, suffix: str) -> None:
    put(tmp_path / f"train-00000-of-00002.{suffix}", "any")
    for kind in ("csv", "chat"):
        with pytest.raises(DataError, match="shard 1 of 2 of train is not there"):
            load_task("csv", path=tmp_path) if kind == "csv" else load_chat("chat", path=tmp_path)
    if "json" in suffix or suffix == "parquet":
        with pytest.raises(DataError, match="shard 1 of 2 of train is not there"):
            load_chat("oasst", path=tmp_path)


def test_an_error_in_a_shard_names_the_shard_and_its_line(tmp_path: Path) -> None:
    shards(tmp_path, "train-00000-of-00002.csv")
    put(tmp_path / "train-00001-of-00002.csv", "text,label\nx,a\n,b\n")
    with pytest.raises(DataError, match=r"is empty\nwhere: .*train-00001-of-00002\.csv:3"):
        load_task("csv", path=tmp_path)


def test_columns_that_only_some_shards_have(tmp_path: Path) -> None:
    put(tmp_path / "train-00000-of-00002.csv", "text,label,extra\na,x,1\nb,y,2\n")
    put(tmp_path / "train-00001-of-00002.csv", "label,text\nx,c\n")
    assert texts(load_task("csv", path=tmp_path)) == ["a", "b", "c"]
    with pytest.raises(DataError, match=r"no column 'extra', which.*\nwhere: .*00001-of-00002"):
        load_task("csv", path=tmp_path, columns={"text": "extra"})
    put(tmp_path / "a.jsonl", '{"a": 1}\n')
    put(tmp_path / "b.jsonl", '{"b": 2}\n{"a": 3}\n')
    table = read_table([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
    assert table.columns["b"] == [None, 2, None] and table.place(2) == f"{tmp_path}/b.jsonl:2"


def test_files_in_data_and_beside_it_that_are_not_read_are_named(tmp_path: Path) -> None:
    shards(tmp_path, "train.csv", "train.zip", "val.txt", "data/validation.csv", "valid/part.csv")
    put(tmp_path / "checkpoints" / "train.csv", CSV)
    (note,) = (n for n in load_task("csv", path=tmp_path).notes if "not read in" in n)
    assert all(
        name in note for name in ("train.zip", "val.txt", "data/validation.csv", "valid/part")
    )
    assert "checkpoints" not in note
    # The other way round: only data/ has training files.
    hub = tmp_path / "hub"
    shards(hub, "validation.csv", "data/train.csv")
    assert any(f"not read in {hub}: validation.csv" in n for n in load_task("csv", path=hub).notes)


def test_a_folder_or_link_named_like_a_split_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "train.csv", CSV)
    named = tmp_path / "validation.csv"
    named.symlink_to("nowhere.csv")
    with pytest.raises(
        DataError, match=r"Expected a file named validation\.csv, got a broken link"
    ):
        load_task("csv", path=tmp_path)
    named.unlink()
    put(named / "part-00000.csv", CSV)  # as Spark writes
    with pytest.raises(DataError, match=r"Expected a file named validation\.csv, got a folder"):
        load_task("csv", path=tmp_path)


def test_a_data_set_cloned_from_the_hub(tmp_path: Path) -> None:
    shards(tmp_path / "data", "train-00000-of-00001.csv", "test-00000-of-00001.csv")
    put(tmp_path / "README.md", "# Data")
    task = load_task("csv", path=tmp_path)
    assert len(texts(task)) == 2
    assert any("not read in" in note and "test-00000-of-00001.csv" in note for note in task.notes)


def test_files_that_are_not_read_are_named(tmp_path: Path) -> None:
    shards(tmp_path, "train.csv", "dev.csv", "valid.csv", "train.json", "extra.csv.gz")
    put(tmp_path / "dataset_infos.json", "{}")
    (note,) = load_task("csv", path=tmp_path).notes
    assert "extra.csv.gz" in note and "valid.csv" in note and "train.json" in note
    assert "dataset_infos" not in note and note.endswith("read: train.csv, dev.csv")


def test_a_single_shard_as_path_is_noted(tmp_path: Path) -> None:
    shards(tmp_path, "train-00000-of-00002.csv")
    notes = load_task("csv", path=tmp_path / "train-00000-of-00002.csv").notes
    assert "is one of 2 shards" in notes[0] and "set task.path to the folder" in notes[0]


# --- long values


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_a_text_may_be_longer_than_the_limit_of_the_csv_module(tmp_path: Path, suffix: str) -> None:
    long = 'said "q", ' * 20_000
    limit = csv.field_size_limit()
    assert len(long) > limit
    path = tmp_path / f"d.{suffix}"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if suffix == "tsv" else ",")
        writer.writerows([("text", "label"), (long, "a"), ('short "q" x', "b")])
    assert texts(load_task("csv", path=path)) == sorted([long, 'short "q" x'])
    assert csv.field_size_limit() == limit


def test_an_integer_of_thousands_of_digits_in_an_unused_column(tmp_path: Path) -> None:
    number = "9" * 5000
    lines = JSONL.replace("}", f', "id": {number}}}')
    assert texts(load_task("json", path=put(tmp_path / "d.jsonl", lines))) == ALL
    array = "[" + ",".join(lines.strip().split("\n")) + "]"
    path = put(tmp_path / "d.json", array)
    assert texts(load_task("json", path=path)) == ALL
    assert str(read_table([path]).columns["id"][0]) == number


def test_texts_may_exceed_the_size_of_an_arrow_string_column(tmp_path: Path) -> None:
    task = load_task("csv", path=put(tmp_path / "d.csv", CSV))
    assert task.train.features["text"].dtype == "large_string"  # string: 2 GiB of a column


# --- separators, quotes and headers


@pytest.mark.parametrize(
    ("name", "mark", "note"),
    [
        ("d.csv", ";", "columns are separated by semicolons"),
        ("d.csv", "\t", "columns are separated by tabs"),
        ("d.csv", "|", "columns are separated by vertical bars"),
        ("d.tsv", ",", "columns are separated by commas"),
        ("d.tsv", ";", "columns are separated by semicolons"),
    ],
)
def test_another_separator_is_found_and_noted(
    tmp_path: Path, name: str, mark: str, note: str
) -> None:
    lines = [f"text{mark}label", *(f'"{text}"{mark}{label}' for text, label in ROWS)]
    task = load_task("csv", path=put(tmp_path / name, "\n".join(lines)))
    assert texts(task) == ALL
    assert f"{name}: {note}" in task.notes


def test_commas_in_texts_do_not_hide_semicolons(tmp_path: Path) -> None:
    lines = ["text;label", *(f"{text};{label}" for text, label in ROWS)]  # each text has a comma
    assert texts(load_task("csv", path=put(tmp_path / "d.csv", "\n".join(lines)))) == ALL
    put(tmp_path / "d.csv", "text;label\na, b;x\nc\n")
    with pytest.raises(DataError, match=r"1 column, expected 2\n.*d\.csv:3"):
        load_task("csv", path=tmp_path / "d.csv")


def test_a_file_with_a_fitting_separator_is_not_read_with_another(tmp_path: Path) -> None:
    path = put(tmp_path / "d.csv", "text,label\na; b,x\nc; d; e,y\n")
    task = load_task("csv", path=path)
    assert texts(task) == ["a; b", "c; d; e"]
    assert not any("separated" in note for note in task.notes)


def test_the_separator_can_be_set(tmp_path: Path) -> None:
    path = put(tmp_path / "d.csv", "text^label\na,x^1\nb^2\n")
    assert texts(load_task("csv", path=path, separator="^")) == ["a,x", "b"]
    tabs = put(tmp_path / "t.csv", "text\tlabel\na,x\t1\nb\t2\n")
    assert texts(load_task("csv", path=tabs, separator="tab")) == ["a,x", "b"]
    with pytest.raises(UsageError, match="separator is for CSV and TSV files"):
        load_task("json", path=put(tmp_path / "d.jsonl", JSONL), separator=";")


def test_excel_may_declare_its_separator(tmp_path: Path) -> None:
    path = put(tmp_path / "d.csv", "\ufeffsep=;\r\ntext;label\r\na,x;1\r\nb;2\r\n")
    assert texts(load_task("csv", path=path)) == ["a,x", "b"]


@pytest.mark.parametrize(
    "text",
    [
        "text,label,,\na,x,,\nb,y,,\n",
        "text,label\na,x,\nb,y,,\n",
        "text,label,,\na,x\nb,y\n",
        "text,label\na,x\nb,y\n,\n , \n\n  \n",
        "text,label\r\n\r\na,x\r\n\r\nb,y\r\n\r\n",
        "text,label\ra,x\rb,y\r",
        "\ufefftext,label\na,x\nb,y",
        "text,label,id,id\na,x,1,2\nb,y,3,4\n",
    ],
    ids=["header", "rows", "short", "blank", "crlf", "cr", "bom", "twice"],
)
def test_empty_columns_and_rows_are_ignored(tmp_path: Path, text: str) -> None:
    for suffix in ("csv", "tsv"):
        marked = text if suffix == "csv" else text.replace(",", "\t")
        task = load_task("csv", path=put(tmp_path / f"D.{suffix.upper()}", marked))
        assert texts(task) == ["a", "b"] and not any("D." in note for note in task.notes)


def test_a_column_without_a_name_is_not_read_and_noted(tmp_path: Path) -> None:
    task = load_task("csv", path=put(tmp_path / "d.csv", ",text,label\n0,a,x\n1,b,y\n"))
    assert texts(task) == ["a", "b"]
    assert "d.csv: column 1 has no name in the header: not read" in task.notes


def test_a_separator_in_an_unquoted_text_does_not_hide_behind_empty_columns(tmp_path: Path) -> None:
    path = put(tmp_path / "d.csv", "text,label,\nhello, world,x\nb,y,\n")
    with pytest.raises(DataError, match=r"3 columns, expected 2\n.*d\.csv:2"):
        load_task("csv", path=path)


def test_a_tsv_that_is_quoted_in_part_is_refused(tmp_path: Path) -> None:
    path = put(tmp_path / "d.tsv", 'text\tlabel\n"a ""b"" c"\tx\n"he" said\ty\n')
    with pytest.raises(DataError, match=r"is not CSV.*\n.*d\.tsv:3"):
        load_task("csv", path=path)
    put(path, 'text\tlabel\n"a\tb"\tx\nc\ty\n')
    assert texts(load_task("csv", path=path)) == ["a\tb", "c"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["d.csv", "d.jsonl"])
def test_other_encodings_are_named(tmp_path: Path, name: str, encoding: str) -> None:
    path = put(tmp_path / name, (BARE if name == "d.csv" else JSONL).encode(encoding))
    with pytest.raises(DataError, match=r"expected UTF-8 text.*UTF.*\n.*\nfix: save it as UTF-8"):
        load_task("csv", path=path)


# --- compressed files


@pytest.mark.parametrize("packing", PACKING)
@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "ndjson"])
def test_compressed_files_are_read_like_plain_ones(
    tmp_path: Path, suffix: str, packing: str
) -> None:
    content = {
        "csv": CSV,
        "tsv": CSV.replace('",', '"\t').replace("text,", "text\t"),
        "json": json.dumps([json.loads(line) for line in JSONL.strip().split("\n")]),
    }.get(suffix, JSONL)
    plain = load_task("csv", path=put(tmp_path / f"d.{suffix}", content))
    packed = put(tmp_path / f"x.{suffix}{packing}", PACKING[packing](content.encode()))
    assert load_task("csv", path=packed).data_hash == plain.data_hash
    for split in ("train", "validation"):
        put(tmp_path / "both" / f"{split}.{suffix}{packing}", packed.read_bytes())
        put(tmp_path / "plain" / f"{split}.{suffix}", content)
    folder = load_task("csv", path=tmp_path / "both")
    assert folder.data_hash == load_task("csv", path=tmp_path / "plain").data_hash
    assert folder.notes == ()


@pytest.mark.parametrize("packing", PACKING)
def test_chats_are_read_from_compressed_files_too(tmp_path: Path, packing: str) -> None:
    pack = PACKING[packing]
    rows = [{"prompt": f"q{n}", "completion": "a"} for n in range(30)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    put(tmp_path / "chat" / f"train.jsonl{packing}", pack(lines.encode()))
    assert load_chat("chat", path=tmp_path / "chat").counts["rows read"] == 30
    trees = [tree(node(f"p{n}", node(f"a{n}"))) for n in range(30)]
    plain = write(tmp_path / "x.trees.jsonl", *trees)
    packed = put(tmp_path / "oasst" / f"x.trees.jsonl{packing}", pack(plain.read_bytes()))
    for path in (packed, packed.parent):
        assert load_chat("oasst", path=path).data_hash == load_chat("oasst", path=plain).data_hash


@pytest.mark.parametrize("packing", PACKING)
def test_damaged_compressed_files_are_refused_by_name(tmp_path: Path, packing: str) -> None:
    whole = PACKING[packing](CSV.encode() * 50)
    with pytest.raises(DataError, match=r"cut off|damaged"):
        load_task("csv", path=put(tmp_path / f"d.csv{packing}", whole[:-20]))
    with pytest.raises(DataError, match="though its name says so"):
        load_task("csv", path=put(tmp_path / f"d.csv{packing}", CSV))


@pytest.mark.parametrize("packing", PACKING)
@pytest.mark.parametrize("name", ["d.csv", "d.jsonl"])
def test_a_small_file_that_unpacks_to_a_huge_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, packing: str
) -> None:
    monkeypatch.setattr(text_files, "MAX_BYTES", 2**20)
    bomb = PACKING[packing](b"a" * 2**22)
    path = put(tmp_path / f"{name}{packing}", bomb)
    with pytest.raises(DataError, match=r"unpacks to more than 1 MiB.*\n.*\n.*unpack it yourself"):
        load_task("csv", path=path)


_GZIPPED = gzip.compress(b"PAR1", mtime=0)  # Without a time: it is part of a test's name.


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.zip", zipped(b"x", "a.csv", "b.csv"), r"found 2: a\.csv, b\.csv\n.*\nfix: unpack it"),
        ("d.zip", zipped(b"x", "a.csv.gz"), r"holds a compressed file: a\.csv\.gz"),
        ("d.csv.7z", b"7z\xbc\xaf\x27\x1c", r"is an archive.*\n.*\nfix: unpack it"),
        ("d.tar.gz", b"\x1f\x8b", r"is an archive.*\n.*\nfix: unpack it"),
        ("d.csv.lz4", b"\x04\x22\x4d\x18", r"is compressed in a format.*\n.*\nfix: unpack it"),
        ("d.parquet.gz", _GZIPPED, r"that is not compressed\n.*\nfix: unpack it"),
        ("d.csv", b"ARROW1\0\0", r"found an Arrow file\n.*\nfix: convert it to Parquet"),
        ("d.csv", b"PAR1\x15\x04", r"found a Parquet file\n.*\nfix: rename it"),
        ("d.arrow", b"ARROW1\0\0", r"is an Arrow file.*\n.*\nfix: convert it"),
        ("d.feather", b"FEA1", r"is a Feather file.*\n.*\nfix: convert it"),
        ("d.xlsx", zipped(b"x"), r"is an Excel file.*\n.*\nfix: export the sheet as CSV"),
        ("d.pkl", b"\x80\x04", r"is a pickle, which can run code"),
    ],
)
def test_other_formats_are_refused_by_name(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load_task("csv", path=put(tmp_path / name, content))
    folder = put(tmp_path / "in" / name.replace("d.", "train."), content).parent
    with pytest.raises(DataError, match=message.replace("d.", "train.")):
        load_task("csv", path=folder)


def test_the_member_of_a_zip_file_decides_its_format(tmp_path: Path) -> None:
    path = put(tmp_path / "d.zip", zipped(JSONL.encode(), "folder/rows.jsonl"))
    assert texts(load_task("csv", path=path)) == ALL


# --- JSON


def test_a_file_that_is_one_object_around_its_rows(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in JSONL.strip().split("\n")]
    for indent in (None, 2):
        whole = json.dumps({"version": 1, "data": rows}, indent=indent)
        assert texts(load_task("json", path=put(tmp_path / "d.json", whole))) == ALL
    put(tmp_path / "d.json", '{"data": [\n{"text": "a", "label": 1},\n{"text": "b" "label": 0}\n]}')
    with pytest.raises(DataError, match=r"not JSON: .*\n.*d\.json:3"):
        load_task("json", path=tmp_path / "d.json")
    put(tmp_path / "d.json", json.dumps({"train": rows}, indent=2))
    with pytest.raises(UsageError, match="choose one of: train"):
        load_task("json", path=tmp_path / "d.json")


# --- Parquet


def parquet(path: Path, **columns: Any) -> Path:
    """Return four rows of text and label with the given columns, which may be Arrow arrays."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    made = {"text": ["a", "b", "c", "d"], "label": [0, 1, 0, 1], **columns}
    pq.write_table(pa.table({name: pa.array(values) for name, values in made.items()}), path)
    return path


def faulty() -> dict[str, Any]:
    """Return name -> a column that Arrow can hold and Python cannot."""
    import pyarrow as pa

    offsets = pa.array([0, 1, 2, 4, 5], pa.int32()).buffers()[1]
    text = pa.StringArray.from_buffers(4, offsets, pa.py_buffer(b"ab\xff\xfed"))
    numbers = pa.array([1, 2, 3, 4])
    return {
        "far": pa.array([0, 0, 2**60, 0], pa.timestamp("ms")),
        "zone": pa.array([1, 2, 3, 4], pa.timestamp("us", "Mars/Phobos")),
        "twice": pa.StructArray.from_arrays([numbers, numbers], ["a", "a"]),
        "text8": text,
    }


@pytest.mark.parametrize("name", ["far", "zone", "twice", "text8"])
def test_a_damaged_column_is_refused_only_if_it_is_used(tmp_path: Path, name: str) -> None:
    path = parquet(tmp_path / "d.parquet", **{name: faulty()[name]})
    assert texts(load_task("parquet", path=path)) == ["a", "b", "c", "d"]
    row = 3 if name in ("far", "text8") else 1
    message = rf"column '{name}' cannot be read: .*\nwhere: {path}, row {row}\nfix: "
    for role in ("text", "label"):
        with pytest.raises(DataError, match=message):
            load_task("parquet", path=path, columns={role: name})


def test_repeated_columns_are_refused_only_if_they_are_used(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"text": ["a", "b"], "label": [0, 1]})
    table = table.append_column("score", pa.array([1, 2])).append_column("score", pa.array([3, 4]))
    path = tmp_path / "d.parquet"
    pq.write_table(table, path)
    assert texts(load_task("parquet", path=path)) == ["a", "b"]
    with pytest.raises(
        DataError, match=rf"one column or key named 'score', got two\nwhere: {path}"
    ):
        load_task("parquet", path=path, columns={"label": "score"})


def test_chats_are_read_beside_a_damaged_column(tmp_path: Path) -> None:
    path = parquet(
        tmp_path / "d.parquet",
        prompt=["q", "r", "s", "t"],
        completion=["a"] * 4,
        far=faulty()["far"],
    )
    assert load_chat("chat", path=path).counts["rows kept"] == 4


def test_columns_of_every_type_that_is_text_or_a_number(tmp_path: Path) -> None:
    import pyarrow as pa

    words = ["a", "b", "c", "d"]
    for column in (
        pa.array(words, pa.large_string()),
        pa.array(words).dictionary_encode(),
        pa.chunked_array([words[:1], words[1:]], pa.string()).combine_chunks(),
        pa.array(words, pa.string_view()),
    ):
        path = parquet(tmp_path / "d.parquet", text=column)
        assert texts(load_task("parquet", path=path)) == words
    for label in (
        pa.array([Decimal(0), Decimal(1)] * 2, pa.decimal128(20, 0)),
        pa.array([0, 1, 0, 1], pa.uint64()),
        pa.array(["0", "1", "0", "1"]).dictionary_encode(),
    ):
        path = parquet(tmp_path / "d.parquet", label=label)
        assert load_task("parquet", path=path).spec.label_names == ("0", "1")
    scores = parquet(tmp_path / "d.parquet", label=[Decimal("0.50"), Decimal("1.25")] * 2)
    assert load_task("parquet", path=scores).spec.regression


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("text", [["a"]] * 4, "column 'text' holds a list, expected text"),
        ("text", [{"a": 1}] * 4, "column 'text' holds an object with fields, expected text"),
        ("text", [b"a"] * 4, "column 'text' holds bytes, expected text"),
        ("text", [None] * 4, "column 'text' is empty"),
        ("label", [None] * 4, "column 'label' is empty"),
        ("label", [datetime.datetime(2020, 1, 1)] * 4, "column 'label' is a datetime"),
    ],
)
def test_columns_of_other_types_are_refused_by_name(
    tmp_path: Path, column: str, values: list[Any], message: str
) -> None:
    path = parquet(tmp_path / "d.parquet", **{column: values})
    with pytest.raises(DataError, match=rf"{message}.*\nwhere: {path}, row 1"):
        load_task("parquet", path=path)


def test_a_damaged_parquet_file_names_itself(tmp_path: Path) -> None:
    path = parquet(tmp_path / "d.parquet")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=rf"cannot be read: .*\nwhere: {path}"):
        load_task("parquet", path=path)


@pytest.mark.parametrize(("suffix", "pack"), [(".bz2", bz2.compress), (".xz", lzma.compress)])
def test_a_damaged_later_stream_is_refused(
    tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]
) -> None:
    header, *lines = CSV.encode().splitlines(keepends=True)
    first, second = pack(header + b"".join(lines[:5])), pack(b"".join(lines[5:]))
    file = tmp_path / f"d.csv{suffix}"
    for padding in (b"", b"\0" * 8):
        task = load_task("csv", path=put(file, first + padding + second + padding))
        assert texts(task) == ALL
    for packed, message in (
        (first + b"X" + second[1:], "damaged"),
        (first + second + b"more", "damaged|cut off"),
        (first + second[:-9], "cut off"),
    ):
        with pytest.raises(DataError, match=message):
            load_task("csv", path=put(file, packed))


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_git_lfs_pointer_is_named(tmp_path: Path, suffix: str) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    with pytest.raises(DataError, match="Git LFS pointer") as error:
        load_task("csv", path=put(tmp_path / f"d.{suffix}", text))
    assert "git lfs pull" in (error.value.fix or "")
