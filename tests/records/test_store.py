"""Records on disk: read with checks, written whole or not at all."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from sparsegrad_cli.errors import DiskError, FileFormatError, UsageError
from sparsegrad_cli.records.store import load_record, write_json_atomic


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
