"""JSON files: numbers as written, records with their places, nesting that is too deep."""

from __future__ import annotations

import gzip
from decimal import Decimal
from pathlib import Path

import pytest

from sparsegrad_cli.data.json_files import RepeatedKeys, WrittenFloat, json_records, parse_json
from sparsegrad_cli.data.read_table import read_table
from sparsegrad_cli.data.text_files import read_text
from sparsegrad_cli.errors import DataError


def test_numbers_keep_their_text_and_objects_know_repeated_keys() -> None:
    found = parse_json('{"a": 1.10, "b": [1e5, -0, 7], "a": 2.50}')
    assert isinstance(found, RepeatedKeys) and found.repeated == ("a",)
    floats = [found["a"], *found["b"][:2]]
    assert all(isinstance(each, WrittenFloat) for each in floats)
    assert [each.written for each in floats] == ["2.50", "1e5", "-0"]
    assert found["b"][2] == 7 and parse_json("9" * 5000) == Decimal("9" * 5000)


@pytest.mark.parametrize("content", ['{"a": ' * 5000 + "7" + "}" * 5000, "[" * 5000 + "]" * 5000])
def test_nesting_of_thousands_of_levels_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(f"{content}\n")
    with pytest.raises(DataError, match=r"at most about 1000 levels deep.*\nwhere: .*x\.jsonl"):
        list(json_records(file))


def test_records_know_their_places(tmp_path: Path) -> None:
    lines, array = tmp_path / "x.jsonl", tmp_path / "y.jsonl"
    lines.write_text('\n{"a": 1}\n\n[2]\n')
    array.write_text('\n [\n{"a": 1},\n[2]]')
    assert [each.place for each in json_records(lines)] == [f"{lines}:2", f"{lines}:4"]
    assert [each.place for each in json_records(array)] == [f"{array}, row 1", f"{array}, row 2"]
    assert [each.value for each in json_records(array)] == [{"a": 1}, [2]]


def test_lines_that_begin_with_an_array(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('[1]\n{"a": 2}\n')
    assert [each.value for each in json_records(file)] == [[1], {"a": 2}]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv"])
def test_tables_may_be_gzip(tmp_path: Path, suffix: str) -> None:
    text = {"csv": "a,b\n1,é\n", "tsv": "a\tb\n1\té\n"}.get(suffix, '{"a": "1", "b": "é"}\n')
    file = tmp_path / f"x.{suffix}.gz"
    file.write_bytes(gzip.compress(text.encode("utf-8-sig")))
    table = read_table([file])
    assert table.columns == {"a": ["1"], "b": ["é"]} and str(file) in table.place(0)
    assert read_text(file) == text


def test_an_unreadable_file_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be read: Is a directory\nwhere: "):
        read_text(tmp_path)
    with pytest.raises(DataError, match="cannot be read: No such file"):
        list(json_records(tmp_path / "gone.jsonl"))
