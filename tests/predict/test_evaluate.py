"""`sparsegrad evaluate`: metrics, intervals, confusion matrix and wrong rows, by their formulas."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, f1_score, matthews_corrcoef
from support.cli_runs import Cli
from support.small_runs import base_folder, data_folder, record, sentences, train

ROWS = sentences(5, 60)
NAMES = ("high", "low")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    return train(
        folder / "run", base_folder(folder / "base"), data_folder(folder / "data"), "method=lora"
    )


def write_rows(path: Path, rows: list[tuple[str, str]], label: str = "label") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", label), *rows])
    return path


def wilson(right: int, rows: int) -> list[float]:
    """Return the 95 % score interval: the shares p with (right / n - p)^2 = z^2 p (1 - p) / n."""
    z2, share = 1.959963984540054**2, right / rows
    ends = np.roots([1 + z2 / rows, -(2 * share + z2 / rows), share**2])
    return sorted(ends.real.tolist())


def test_without_an_error_the_few_rows_show_in_the_interval(
    run: Path, cli: Cli, tmp_path: Path
) -> None:
    """Resamples of rows that are all right are all right: 100 to 100 would be false."""
    labels = cli("predict", str(run), *(text for text, _ in ROWS[:12])).out.splitlines()
    rows = [(text, line.split("\t")[0]) for (text, _), line in zip(ROWS, labels, strict=False)]
    source = write_rows(tmp_path / "test.csv", rows)
    found = json.loads(cli("evaluate", str(run), str(source), "--json").out)
    accuracy = found["metrics"]["accuracy"]
    assert (accuracy["value"], accuracy["interval_by"]) == (1, "wilson")
    assert accuracy["interval"] == pytest.approx(wilson(12, 12)) and accuracy["interval"][0] < 0.8
    assert found["metrics"]["f1_macro"]["interval"] is None
    note = "no row is wrong: a bootstrap gives no interval for f1_macro and matthews_correlation"
    assert note in found["notes"]
    shown = cli("evaluate", str(run), str(source)).out
    assert "intervals: Wilson's for accuracy\n" in shown
    assert any(line.split()[-3:] == ["95", "%", "interval"] for line in shown.splitlines())


def test_numbers_are_those_of_the_formulas(run: Path, cli: Cli, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "test.csv", ROWS)
    ended = cli("evaluate", str(run), str(source), "--json", "--worst", "4", "--resamples", "200")
    assert ended.code == 0, ended.err
    found: dict[str, Any] = json.loads(ended.out)
    cli("predict", str(run), str(source), "-o", str(tmp_path / "out.jsonl"), "-p", "-q")
    predicted = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    true = [label for _, label in ROWS]
    answers = [row["prediction"] for row in predicted]
    right = np.array([a == b for a, b in zip(true, answers, strict=True)])
    assert 0 < right.sum() < len(ROWS)
    values = {name: metric["value"] for name, metric in found["metrics"].items()}
    assert values == {
        "accuracy": pytest.approx(right.mean()),
        "f1_macro": pytest.approx(f1_score(true, answers, average="macro")),
        "matthews_correlation": pytest.approx(matthews_corrcoef(true, answers)),
    }
    assert found["confusion"] == confusion_matrix(true, answers, labels=NAMES).tolist()
    own = [row[f"probability_{label}"] for row, label in zip(predicted, true, strict=True)]
    losses = [-math.log(probability) for probability in own]
    assert found["loss"] == pytest.approx(np.mean(losses), abs=1e-4)
    wrong = sorted(((x, n) for n, x in enumerate(losses) if not right[n]), reverse=True)[:4]
    assert [w["place"] for w in found["worst"]] == [f"{source}:{n + 2}" for _, n in wrong]
    assert [w["texts"] for w in found["worst"]] == [[ROWS[n][0]] for _, n in wrong]
    draw = np.random.default_rng(0)
    of = (np.array(true), np.array(answers))
    drawn = [draw.integers(60, size=60) for _ in range(200)]
    means = [f1_score(of[0][at], of[1][at], average="macro") for at in drawn]
    interval = found["metrics"]["f1_macro"]["interval"]
    assert interval == pytest.approx(np.quantile(means, (0.025, 0.975)).tolist())
    assert found["metrics"]["accuracy"]["interval"] == pytest.approx(wilson(right.sum(), 60))
    classes = {each["name"]: each for each in found["classes"]}
    hits = sum(a == b == "low" for a, b in zip(true, answers, strict=True))
    assert classes["low"]["recall"] == pytest.approx(hits / true.count("low"))
    assert classes["low"]["precision"] == pytest.approx(hits / answers.count("low"))


def test_validation_data_gives_the_score_of_the_run(run: Path, cli: Cli, tmp_path: Path) -> None:
    data = run.parent / "data" / "validation.csv"
    folder = tmp_path / "report"
    ended = cli("evaluate", str(run), str(data), "-o", str(folder))
    assert ended.code == 0, ended.err
    kept = json.loads((folder / "evaluation.json").read_text())
    final = record(run)["metrics"]["final"]
    assert kept["metrics"]["accuracy"]["value"] == pytest.approx(final["score"])
    assert kept["loss"] == pytest.approx(final["loss"], rel=1e-5)
    page = (folder / "report.html").read_text()
    assert "Confusion matrix" in page and "95 % interval" in page
    assert "Confusion matrix" in (folder / "report.md").read_text()
    assert f"Report: {folder / 'report.html'}" in ended.out


def test_class_ids_are_read_with_a_note(run: Path, cli: Cli, tmp_path: Path) -> None:
    named = write_rows(tmp_path / "named.csv", ROWS, "answer")
    ids = write_rows(tmp_path / "ids.csv", [(t, str(NAMES.index(label))) for t, label in ROWS])
    options = ("--json", "--resamples", "0")
    by_name = json.loads(
        cli("evaluate", str(run), str(named), "--label-column", "answer", *options).out
    )
    by_id = json.loads(cli("evaluate", str(run), str(ids), *options).out)
    assert by_id["metrics"] == by_name["metrics"]
    assert by_id["metrics"]["accuracy"]["interval"] is None
    assert by_id["notes"][0] == "60 labels are read as ids of the classes 0 to 1: high, low"


def test_scores_of_a_regressor(run: Path, cli: Cli, tmp_path: Path) -> None:
    rows = [(text, f"{number / 10:.1f}") for number, (text, _) in enumerate(ROWS)]
    source = write_rows(tmp_path / "scores.csv", rows)
    more = ("method=lora", f"task.path={source}", "task.type=regression")
    scored = train(tmp_path / "run", run.parent / "base", run.parent / "data", *more)
    found = json.loads(cli("evaluate", str(scored), str(source), "--json", "--resamples", "50").out)
    assert set(found["metrics"]) == {"pearson", "spearmanr"}
    assert (found["classes"], found["confusion"]) == ([], [])
    errors = [example["loss"] for example in found["worst"]]
    assert errors == sorted(errors, reverse=True) and len(errors) == 20
    shown = cli("evaluate", str(scored), str(source), "--resamples", "50").out
    assert "Pearson correlation" in shown and "rows with the largest error" in shown
    bad = write_rows(tmp_path / "bad.csv", [("a", "much")])
    refused = cli("evaluate", str(scored), str(bad))
    assert (refused.code, "expected a number in column 'label', got 'much'" in refused.flat) == (
        2,
        True,
    )


@pytest.mark.parametrize(
    ("rows", "column", "expected"),
    [
        ([("a", "high"), ("b", "middle")], "label", "the label 'middle' is not a class"),
        ([("a", "high"), ("b", "")], "label", "the label in column 'label' is empty"),
        ([("a", "high"), ("", "low")], "label", "makes no token of an empty text"),
        ([("a", "high")], "answer", "the file has no column 'label' for the labels"),
    ],
)
def test_bad_rows_are_refused(
    rows: list[tuple[str, str]],
    column: str,
    expected: str,
    run: Path,
    cli: Cli,
    tmp_path: Path,
) -> None:
    source = write_rows(tmp_path / "bad.csv", rows, column)
    ended = cli("evaluate", str(run), str(source), "-o", str(tmp_path / "report"))
    assert (ended.code, expected in ended.flat) == (2, True), ended.err
    assert not (tmp_path / "report").exists()
    assert cli("evaluate", str(run), "nowhere.csv").code == 2
    folder = cli("evaluate", str(run), str(run))
    assert folder.code == 2 and "got the folder" in folder.err and "fix" in folder.err
