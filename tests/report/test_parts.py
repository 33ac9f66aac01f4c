"""Numbers, tables and files that all reports are made of."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from sparsegrad_cli.errors import DiskError, FileFormatError, UsageError
from sparsegrad_cli.records.store import load_record, write_json_atomic
from sparsegrad_cli.report import access, units
from sparsegrad_cli.report.tables import Table, escape_markdown, table_markdown


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (None, "not recorded"),
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1024**2 - 1, "1.0 MiB"),
        (1024**2 * 1.25, "1.2 MiB"),
        (1024**3 * 5, "5.0 GiB"),
    ],
)
def test_bytes(count: float | None, words: str) -> None:
    assert units.format_bytes(count) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (0.0123, "12.3 ms"),
        (0.25, "0.25 s"),
        (9.96, "10 s"),
        (59.7, "1 min"),
        (72, "1 min 12 s"),
        (3599.6, "1 h"),
        (3600 * 25, "1 d 1 h"),
    ],
)
def test_seconds(seconds: float, words: str) -> None:
    assert units.format_seconds(seconds) == words


def test_scores_shares_and_probabilities() -> None:
    assert units.format_score(0.6123) == "61.2"
    assert units.format_score(-0.0004) == "0.0"
    assert units.format_score(-0.05, sign=True) == "\N{MINUS SIGN}5.0"
    assert units.format_spread(0.5, 0.012) == "50.0 ± 1.2"
    assert units.format_share(0.01) == "1.00 %"
    assert units.format_share(0.311) == "31.1 %"
    assert units.format_p(0.0) == "< 0.001"
    assert units.format_number(3.05e-5) == "3.05e-05"
    assert units.format_number(12345.6) == "12,346"


def test_access_never_raises_and_never_lets_a_nan_through() -> None:
    data = {"a": {"b": math.nan, "c": True, "d": 10**400, "e": 3}, "f": [1, "x", None, 2.5]}
    assert access.number(data, "a", "b") is None
    assert access.number(data, "a", "c") is None
    assert access.number(data, "a", "d") is None
    assert access.number(data, "a", "e") == 3.0
    assert access.number(data, "f", "b") is None
    assert access.numbers(data, "f") == [1.0, 2.5]
    assert access.text({"x": "a\x00\nb\ud800"}, "x") == "a b\ufffd"


def test_a_column_in_which_no_row_has_anything_is_left_out() -> None:
    table = Table("t", ("n", "a", "b", "c"), [("x", None, "1", None), ("y", None, None, None)])
    strong = Table(table.caption, table.header, table.rows, strong=frozenset({(0, 2)}))
    kept = strong.without_empty()
    assert kept.header == ("n", "b")
    assert kept.strong == {(0, 1)}
    assert "| x | **1** |" in table_markdown(kept)
    assert "| y | not recorded |" in table_markdown(kept)


def test_markdown_is_escaped_where_it_would_mean_something() -> None:
    assert escape_markdown("a|b") == r"a\|b"
    assert escape_markdown("<i>&") == "&lt;i>&amp;"
    assert escape_markdown("snake_case_name") == "snake_case_name"
    assert escape_markdown("_em_") == r"\_em\_"


def test_records_round_trip_without_nan(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_json_atomic(path, {"schema": 1, "x": math.inf, "y": (1, 2.5), "z": {3: "ü"}})
    assert json.loads(path.read_text()) == {"schema": 1, "x": None, "y": [1, 2.5], "z": {"3": "ü"}}
    assert load_record(tmp_path) == load_record(path)
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ("{", "damaged"),
        ("[1]", "expected a JSON object"),
        ("{}", "names no schema"),
        ('{"schema": 99}', "schema 99"),
        ('{"schema": true}', "schema True"),
    ],
)
def test_a_file_that_is_no_record_is_refused(tmp_path: Path, raw: str, says: str) -> None:
    (tmp_path / "run.json").write_text(raw)
    with pytest.raises(FileFormatError, match=says):
        load_record(tmp_path)


def test_a_missing_record_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither"):
        load_record(tmp_path)
    with pytest.raises(UsageError, match="does not exist"):
        load_record(tmp_path / "nowhere")


def test_a_failed_write_keeps_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.json"
    write_json_atomic(path, {"schema": 1})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DiskError, match="No space left"):
        write_json_atomic(path, {"schema": 1, "new": True})
    assert load_record(path) == {"schema": 1}
    assert len(list(tmp_path.iterdir())) == 1
