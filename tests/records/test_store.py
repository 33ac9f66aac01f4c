"""Records on disk: checked on reading, written atomically."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from sparsegrad_cli.errors import DiskError, FileFormatError, InterruptedRunError, UsageError
from sparsegrad_cli.records.base import Block
from sparsegrad_cli.records.run import Evaluation, MetricsBlock, RunRecord, TimeBlock
from sparsegrad_cli.records.store import RunWriter, load_run, load_run_or_study, load_study, write
from sparsegrad_cli.records.study import StudyRecord

RUN: dict[str, Any] = {"schema": 1, "status": "done"}
CELL = {"task": "t", "method": "lora", "seed": 1, "status": "done", "run": RUN}


def file_in(folder: Path, name: str, content: object) -> Path:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "run.json is damaged: Expecting"),
        ("[1]", "expected a JSON object in run.json, got list"),
        ("{}", "names no schema"),
        ({"schema": 99}, "has schema 99; this version reads schema 1"),
        ({"schema": 0, "status": "done"}, "has schema 0"),
        ({"schema": True}, "schema True"),
        ({"schema": 1}, "status: is missing"),
        (RUN | {"status": "fine"}, "status: expected one of 'running', 'done'"),
        (RUN | {"seed": "3"}, "seed: expected a whole number, got '3'"),
        (RUN | {"seed": True}, "seed: expected a whole number, got True"),
        (RUN | {"memory": 7}, "memory: expected an object, got 7"),
        (RUN | {"memory": {"peak_bytes": -1}}, "memory.peak_bytes: expected greater than or"),
        (
            RUN | {"metrics": {"history": [{"step": 1}, {}]}},
            r"metrics.history\[1\].step: is missing",
        ),
        (RUN | {"time": {"train_s": [1]}}, r"time.train_s: expected a number, got \[1\]"),
        (RUN | {"hashes": {"order": {"-1": "a"}}}, "hashes.order.-1: expected a whole number"),
        (RUN | {"task": {"notes": "one"}}, "task.notes: expected a list, got 'one'"),
        ('{"schema": 1, "x": ' + "[" * 5000 + "]" * 5000 + "}", "nested"),
    ],
)
def test_a_damaged_record_is_refused_and_the_key_is_named(
    tmp_path: Path, content: object, says: str
) -> None:
    file = file_in(tmp_path, "run.json", content)
    with pytest.raises(FileFormatError, match=says) as refused:
        load_run(tmp_path)
    assert refused.value.where == str(file)
    fix = str(refused.value.fix)
    newer = content == {"schema": 99}
    assert ("install the sparsegrad" if newer else f"mv {file} {file}.damaged") in fix
    assert "--overwrite" not in fix


def test_many_problems_are_shortened(tmp_path: Path) -> None:
    file_in(tmp_path, "run.json", RUN | {"extended": [7] * 50, "name": ["x" * 500]})
    with pytest.raises(FileFormatError) as refused:
        load_run(tmp_path)
    assert "and 48 more" in refused.value.what and len(refused.value.what) < 400


def test_a_newer_record_asks_for_a_newer_version(tmp_path: Path) -> None:
    file_in(tmp_path, "compare.json", {"schema": 2, "cells": []})
    with pytest.raises(FileFormatError, match=r"compare\.json has schema 2") as refused:
        load_study(tmp_path)
    assert "install" in str(refused.value.fix)


def test_compare_json_without_runs_is_not_the_record_of_a_comparison(tmp_path: Path) -> None:
    for content in ({"schema": 1}, RUN | {"command": "compare"}):
        file_in(tmp_path, "compare.json", content)
        with pytest.raises(FileFormatError, match="is not the record of a comparison"):
            load_run_or_study(tmp_path)


def test_a_damaged_run_in_a_comparison_is_named(tmp_path: Path) -> None:
    cells = [CELL, CELL | {"run": RUN | {"time": {"steps": "x"}}}]
    file_in(tmp_path, "compare.json", RUN | {"cells": cells})
    with pytest.raises(
        FileFormatError, match=r"cells\[1\]\.run\.time\.steps: expected a whole"
    ) as e:
        load_study(tmp_path)
    assert "the runs are still whole: sparsegrad report" in str(e.value.fix)


def test_a_missing_record_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither"):
        load_run(tmp_path)
    with pytest.raises(UsageError, match="does not exist"):
        load_run(tmp_path / "nowhere")


def test_a_run_is_refused_as_a_comparison(tmp_path: Path) -> None:
    file_in(tmp_path, "run.json", RUN)
    with pytest.raises(UsageError, match="expected a comparison"):
        load_study(tmp_path)
    file_in(tmp_path, "compare.json", RUN | {"cells": [CELL]})
    assert isinstance(load_run_or_study(tmp_path), RunRecord)
    assert isinstance(load_study(tmp_path), StudyRecord)
    with pytest.raises(UsageError, match="expected a run"):
        load_run(tmp_path / "compare.json")


def test_unknown_keys_are_ignored_and_nan_is_read_as_none(tmp_path: Path) -> None:
    """Keys that another version added are ignored."""
    text = '{"schema": 1, "status": "done", "new": {}, "time": {"load_s": NaN, "train_s": 1e999}}'
    file_in(tmp_path, "run.json", text)
    found = load_run(tmp_path)
    assert found.time == TimeBlock(load_s=None, train_s=None)
    assert found.to_json() == RUN | {"time": {"load_s": None, "train_s": None}}


def test_a_written_record_is_read_back(tmp_path: Path) -> None:
    best = Evaluation(step=3, score=math.nan, loss=0.5, values={"v": {"f1": math.inf}})
    record = RunRecord(status="done", name="ü\u202e\udcff", metrics=MetricsBlock(best=best))
    write(record, tmp_path / "run.json")
    assert load_run(tmp_path) == record
    content = json.loads((tmp_path / "run.json").read_text())
    assert content["metrics"]["best"]["score"] is None and "seed" not in content
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_a_failed_write_keeps_the_earlier_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = RunRecord(status="done")
    write(record, tmp_path / "run.json")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DiskError, match="No space left"):
        write(record.changed(seed=3), tmp_path / "run.json")
    assert load_run(tmp_path) == record and len(list(tmp_path.iterdir())) == 1


def test_a_run_writer_checks_its_blocks(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path, command="train", seed=7)
    writer.save(time={"load_s": 1.0}, metrics=MetricsBlock(notes=["a"]))
    found = load_run(tmp_path)
    assert (found.status, found.command, found.seed) == ("running", "train", 7)
    assert found.time == TimeBlock(load_s=1.0)
    blocks: list[dict[str, Any]] = [
        {"tmie": {}},
        {"time": {"load": 1.0}},
        {"time": {"load_s": "1"}},
    ]
    for wrong in blocks:
        with pytest.raises(ValidationError):
            writer.save(**wrong)
    assert load_run(tmp_path) == found
    writer.forget_results()
    writer.finish(InterruptedRunError("stopped", details={"step": 3, "unknown": 4}))
    found = load_run(tmp_path)
    assert found.status == "interrupted" and found.error and found.error.step == 3
    assert not {"time", "metrics"} & found.model_fields_set


def test_a_resumed_run_keeps_its_blocks(tmp_path: Path) -> None:
    before = RunRecord(status="interrupted", time=TimeBlock(load_s=1.0), seed=7)
    writer = RunWriter(tmp_path, before, seed=8)
    assert writer.record.time == before.time
    assert (writer.record.status, writer.record.seed) == ("running", 8)
    writer.finish()
    writer.finish(InterruptedRunError("too late"))
    assert load_run(tmp_path).status == "done"


def test_changes_of_a_block_are_checked() -> None:
    block: Block = TimeBlock(load_s=1.0)
    assert block.changed(train_s=2.0).to_json() == {"load_s": 1.0, "train_s": 2.0}
    with pytest.raises(ValidationError):
        block.changed(trains=2.0)
