"""JSON of any depth: the own parser against the library's, and records with their places."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from sparsegrad_cli.data.files import read_table
from sparsegrad_cli.data.json_files import _parse_deep, json_records, parse_json
from sparsegrad_cli.data.text_files import read_text
from sparsegrad_cli.errors import DataError


def made(rng: random.Random, depth: int) -> Any:
    """A random JSON value."""
    kind = rng.randrange(8 if depth else 6)
    if kind == 6:
        return [made(rng, depth - 1) for _ in range(rng.randrange(4))]
    if kind == 7:
        return {rng.choice('ab"\\é\U0001f600') * n: made(rng, depth - 1) for n in range(3)}
    scalars = (None, True, -1.5e-7, 12345678901234567890, 'x"\\\n\u2028\U0001f600', "")
    return scalars[kind]


def test_deep_parser_agrees_with_the_library() -> None:
    rng = random.Random(0)
    for _ in range(400):
        value = made(rng, 6)
        for indent in (None, 1, "\t"):
            text = json.dumps(value, indent=indent, ensure_ascii=rng.random() < 0.5)
            assert _parse_deep(f" \r\n{text}\t ") == json.loads(text) == value


NOT_JSON = (
    *("", " ", "[", "]", "{", "[1,]", "[1 2]", '{"a"}', '{"a" 1}', '{"a":}', "{1: 2}", '{"a":1,}'),
    *("[1]]", '{"a": 1} x', "nul", '"open', "[1}", '{"a": 1]', "01", "+1", "'a'", '"\t"', "[,]"),
)


@pytest.mark.parametrize("text", NOT_JSON)
def test_deep_parser_refuses_what_the_library_refuses(text: str) -> None:
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(text)
    with pytest.raises(json.JSONDecodeError) as found:
        _parse_deep(text)
    # Versions of Python differ in where they see the fault of a comma too many.
    assert abs(found.value.pos - expected.value.pos) <= 1


def test_any_depth() -> None:
    depth = 20_000
    at = parse_json('{"a": [' * depth + "7" + "]}" * depth)
    for _ in range(depth):
        at = at["a"][0]
    assert at == 7
    with pytest.raises(json.JSONDecodeError):
        parse_json("[" * depth)


def test_places(tmp_path: Path) -> None:
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
    table = read_table(file)
    assert table.columns == {"a": ["1"], "b": ["é"]} and str(file) in table.place(0)
    assert read_text(file) == text


def test_unreadable_file_is_an_error_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be read: Is a directory\nwhere: "):
        read_text(tmp_path)
    with pytest.raises(DataError, match="cannot be read: No such file"):
        list(json_records(tmp_path / "gone.jsonl"))
