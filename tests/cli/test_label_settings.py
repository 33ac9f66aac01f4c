"""Label settings on the command line: what trains, what is refused, what reports name."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import pytest
from support.cli_runs import Cli, Outcome
from support.small_runs import base_folder

from sparsegrad_cli.records.study import ResultRow
from sparsegrad_cli.report.scores import scale_of_rows

QUICK = ("method=full", "train.max_steps=2", "train.per_device_train_batch_size=8")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("model"))


def train(cli: Cli, model: Path, *settings: str) -> Outcome:
    short = ("task.max_length=32", "train.use_cpu=true", f"model={model}")
    return cli("train", "task.name=csv", *short, *QUICK, *settings, "-o", "run", "--overwrite")


def record(tmp_path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tmp_path / "run" / "run.json").read_text())
    return found


def csv_file(path: Path, labels: list[str]) -> Path:
    path.parent.mkdir(exist_ok=True)
    rows = "".join(f"text {row},{label}\n" for row, label in enumerate(labels))
    path.write_text("text,label\n" + rows)
    return path


def test_reports_name_the_class_that_f1_is_of(cli: Cli, model: Path, tmp_path: Path) -> None:
    data = csv_file(tmp_path / "f1.csv", ["fraud", *["ok $&<b>"] * 5] * 8)
    default = train(cli, model, f"task.path={data}", "task.metric=f1")
    assert default.code == 0, default.err
    assert "F1 of class ok $&<b> ×100" in default.out
    assert "f1 is that of class 'ok $&<b>', the second of fraud, ok $&<b>" in default.flat
    assert record(tmp_path)["task"]["positive_label"] == "ok $&<b>"
    page = (tmp_path / "run" / "report.html").read_text()
    assert html.escape("F1 of class ok $&<b> ×100") in page and "ok $&<b>" not in page
    assert "F1 of class ok" in (tmp_path / "run" / "report.md").read_text()
    settings = ("task.metric=f1", "task.positive_label=fraud")
    chosen = train(cli, model, f"task.path={data}", *settings)
    assert chosen.code == 0 and "F1 of class fraud ×100" in chosen.out
    assert record(tmp_path)["task"]["positive_label"] == "fraud"
    assert record(tmp_path)["task"]["majority_score"] == 0.0
    other = train(cli, model, f"task.path={data}", "task.metric=f1", "task.positive_label=no")
    assert other.code == 2
    assert "'no' is not a class of csv" in other.flat and "fraud, ok $&<b>" in other.flat


def test_a_comparison_names_the_class_too() -> None:
    row = ResultRow(task="csv", method="full", metric="f1", positive_label="fraud")
    empty = ResultRow(task="csv", method="lora")
    assert scale_of_rows([empty, row]).label == "F1 of class fraud ×100"
    assert scale_of_rows([row.changed(metric="accuracy")]).label == "accuracy ×100"


def test_a_word_class_only_in_training_trains(cli: Cli, model: Path, tmp_path: Path) -> None:
    csv_file(tmp_path / "words" / "train.csv", ["1", "2", "3+"] * 4)
    csv_file(tmp_path / "words" / "validation.csv", ["1", "2"] * 3)
    outcome = train(cli, model, f"task.path={tmp_path / 'words'}", "task.metric=f1_macro")
    assert outcome.code == 0, outcome.err
    task = record(tmp_path)["task"]
    assert task["label_names"] == ["1", "2", "3+"] and task["metric"] == "f1_macro"
    assert task["validation_examples"] == {"validation": 6} and task["positive_label"] is None
    assert "F1, mean over classes ×100" in outcome.out


def test_one_missing_score_is_refused_with_its_line(cli: Cli, model: Path, tmp_path: Path) -> None:
    data = csv_file(tmp_path / "scores.csv", [f"{n}.5" for n in range(7)] + ["NA", "3.25"])
    for settings in ((), ("task.type=regression",)):
        outcome = train(cli, model, f"task.path={data}", *settings)
        assert outcome.code == 2 and f"{data}:9" in outcome.flat.replace("csv :", "csv:")
        assert "'NA'" in outcome.flat and "task.type: classification" in outcome.flat
    csv_file(data, ["1", "2", "3"] * 4)
    outcome = train(cli, model, f"task.path={data}", "task.type=regression")
    assert outcome.code == 0 and record(tmp_path)["task"]["kind"] == "regression"
