"""Rows of data files: as for training, one at a time, with their places."""

from __future__ import annotations

import csv
import gzip
import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sparsegrad_cli.data.read_table import read_table
from sparsegrad_cli.errors import DataError
from sparsegrad_cli.predict.row_stream import count_rows, open_rows

DELIMITED = {
    "plain.csv": "id,text\n1,a b\n2,c\n",
    "quoted.csv": 'id,text\n1,"a, b"\n2,"two\nlines"\n3,"a ""b"""\n',
    "semicolons.csv": "id;text\n1;a, b\n2;c\n",
    "declared.csv": "sep=|\nid|text\n1|a,b\n",
    "bom.csv": "\ufeffid,text\r\n1,a\r\n",
    "blank.csv": "id,text\n1,a\n,\n\n",
    "ends.csv": "id,text,\n1,a,\n",
    "one.csv": "text\nalpha\nbeta\n",
    "bare.tsv": 'id\ttext\n1\tsay "hi\n2\tb\n',
    "quoted.tsv": 'id\ttext\n1\t"a ""b"""\n2\tc\n',
}


@pytest.mark.parametrize("name", DELIMITED)
def test_csv_and_tsv_are_read_as_for_training(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(DELIMITED[name], encoding="utf-8", newline="")
    table = read_table([path])
    stream = open_rows(path)
    rows = [row for chunk in stream.chunks(2) for row in chunk]
    names = list(table.columns)
    assert [n for n in stream.names if n] == names
    assert [[row.values[n] for n in names] for row in rows] == [
        [table.columns[n][at] for n in names] for at in range(len(table))
    ]
    assert [row.place for row in rows] == [table.place(at) for at in range(len(table))]
    assert count_rows(path) == len(table)


def test_compressed_json_and_parquet(tmp_path: Path) -> None:
    rows = [{"text": "a", "n": 1}, {"text": "b", "n": 2, "more": [1]}]
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode()))
    array = tmp_path / "rows.json"
    array.write_text(json.dumps(rows))
    columns = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["a", "b"], "n": [1, 2]}), columns, row_group_size=1)
    for path in (packed, array, columns):
        stream = open_rows(path)
        assert stream.names == ["text", "n"]
        assert [(r.values["text"], r.values["n"]) for r in stream.rows] == [("a", 1), ("b", 2)]
        assert count_rows(path) == 2


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    peaks = {}
    for count in (2_000, 40_000):
        path = tmp_path / f"{count}.csv"
        path.write_text("id,text\n" + "".join(f"{n},some words {n}\n" for n in range(count)))
        tracemalloc.start()
        assert sum(len(chunk) for chunk in open_rows(path).chunks(100)) == count
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[40_000] < 1.1 * peaks[2_000]


@pytest.mark.parametrize(
    ("name", "text", "expected", "place"),
    [
        ("wide.csv", "id,text\n1,a\n2,b,c\n", "the row has 3 columns, expected 2", ":3"),
        ("quote.csv", 'id,text\n1,"a\n', "the row that begins here is not CSV", ":2"),
        ("twice.csv", "text,text\na,b\n", "two columns are named 'text'", ":1"),
        ("empty.csv", "id,text\n", "the file holds no rows", ""),
        ("nothing.jsonl", "", "the file holds no rows", ""),
        ("list.jsonl", "[1]\n[2]\n", "expected an object with named fields, found list", ":1"),
        ("bad.jsonl", '{"text": "a"}\n{"text": \n', "not JSON", ":2"),
        ("key.jsonl", '{"text": "a", "text": "b"}\n', "the key 'text' is there twice", ":1"),
        ("words.parquet", "no parquet", "the Parquet file cannot be read", ""),
        ("words.txt", "words", "the suffix '.txt' does not say", ""),
    ],
)
def test_bad_files_are_refused_with_their_place(
    name: str, text: str, expected: str, place: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        for _ in open_rows(path).rows:
            pass
    assert expected in caught.value.what
    assert str(caught.value.where).startswith(f"{path}{place}")


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.csv"
    path.write_bytes("id,text\n1,a\n2,caf\xe9\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"not UTF-8: byte 0xe9 .*\nwhere: .*latin\.csv:3\n.*iconv"):
        list(open_rows(path).rows)


def test_the_limit_of_the_csv_module_is_restored(tmp_path: Path) -> None:
    """Readers of two files are closed in any order; other code keeps its limit in between."""
    limit = csv.field_size_limit()
    (tmp_path / "a.csv").write_text("id,text\n1,a\n2,b\n")
    first, second = (open_rows(tmp_path / "a.csv") for _ in range(2))
    for stream in (first, second):
        next(stream.rows)
        assert csv.field_size_limit() == limit
    del first, second
    assert csv.field_size_limit() == limit
