"""`sparsegrad report`: several runs side by side, unfinished runs, evaluations and exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.cli_runs import Cli, Outcome
from support.record_samples import run_record

from sparsegrad_cli.recipe.load_recipe import load_recipe, to_yaml


@pytest.fixture(autouse=True)
def _undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the drawing of figures, which takes long and is tested elsewhere."""
    monkeypatch.setattr("sparsegrad_cli.report.svg.to_svg", lambda figure: "<svg></svg>")


def said(outcome: Outcome) -> str:
    """Return standard output without line breaks."""
    return " ".join(outcome.out.split())


def save_run(folder: Path, *settings: str, **changes: Any) -> None:
    """Write a run's record and recipe into a folder."""
    folder.mkdir(parents=True)
    record = run_record() | changes
    (folder / "run.json").write_text(json.dumps(record))
    recipe = load_recipe("configs/quickstart.yaml", settings).recipe
    (folder / "recipe.yaml").write_text(to_yaml(recipe))


def scored(score: float) -> dict[str, Any]:
    metrics = run_record()["metrics"]
    metrics["best"]["score"] = score
    return {"metrics": metrics}


def test_runs_are_set_side_by_side_with_what_differs(cli: Cli, tmp_path: Path) -> None:
    save_run(tmp_path / "a", "train.learning_rate=2e-3", **scored(0.6))
    lora = {"method": {"name": "lora"}}
    save_run(tmp_path / "b", "method.density=0.02", **lora, **scored(0.65))
    shown = cli("report", "a", "b", "-o", "both")
    assert shown.code == 0, shown.err
    assert "b 65.0, a 60.0; 1 seed: not tested" in said(shown)
    assert "method.density" in shown.out and "train.learning_rate" in shown.out
    assert "output_dir" not in shown.out and "train.num_train_epochs" not in shown.out
    page = (tmp_path / "both" / "report.html").read_text()
    assert "Validation score over training" in page and "sparsegrad compare" in page
    assert "Report: both/report.html" in shown.out
    content = json.loads(cli("report", "a", "b", "--json").out)
    assert [run["output_dir"] for run in content["runs"]] == ["a", "b"]
    assert content["not_comparable"] == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"seed": 7}, "other seed: a 42, b 7"),
        ({"hashes": {"data": "other"}}, "other data: a hex, b other"),
        ({"hashes": None}, "data not recorded: b"),
        ({"task": run_record()["task"] | {"metric": "accuracy"}}, "other metric: a matthews_corr"),
        ({"status": "failed", "metrics": None}, "b has no score (failed)"),
    ],
)
def test_runs_that_cannot_be_compared_get_no_verdict(
    cli: Cli, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    save_run(tmp_path / "a", **scored(0.6))
    save_run(tmp_path / "b", **(scored(0.9) | changes))
    shown = cli("report", "a", "b")
    assert shown.code == 0, shown.err
    assert f"Not comparable, so no verdict: {reason}" in said(shown)
    assert "not tested" not in said(shown) and not (tmp_path / "a" / "report.html").exists()


def test_a_run_without_scores_does_not_count_as_one_of_another_task(
    cli: Cli, tmp_path: Path
) -> None:
    save_run(tmp_path / "a", **scored(0.6))
    nothing = {"status": "interrupted", "metrics": None, "task": None, "hashes": None}
    save_run(tmp_path / "b", **nothing)
    shown = cli("report", "a", "b")
    assert "no verdict: b has no score (interrupted) " in said(shown)
    assert "other " not in said(shown).partition("Scores on")[0]


def test_only_runs_that_calibrate_have_settings_of_calibration(cli: Cli, tmp_path: Path) -> None:
    save_run(tmp_path / "a", "calibration.steps=7", **scored(0.6))
    plain = scored(0.65) | {"calibration": None, "method": {"name": "lora"}}
    for name in ("b", "c"):
        save_run(tmp_path / name, "method=lora", **plain)
    shown = cli("report", "a", "b")
    assert shown.code == 0, shown.err
    (steps,) = [line for line in shown.out.splitlines() if "calibration.steps" in line]
    assert steps.split() == ["calibration.steps", "7", "–"]
    costs = said(shown).partition("Memory and time")[2].partition("times compare")[0]
    assert " none " in costs and "not recorded" not in costs
    assert "calibration." not in cli("report", "b", "c").out


def test_precision_does_not_depend_on_the_number_of_parameters(cli: Cli, tmp_path: Path) -> None:
    """Records of older versions hold a digest that counts the parameters of the head."""
    block = {"autocast": None, "matmul": "highest", "device": "cpu"}
    for name, heads, dtype in (
        ("two", 770, "float32"),
        ("three", 1155, "float32"),
        ("half", 770, "float16"),
    ):
        hashes = run_record()["hashes"] | {"precision": f"digest of {heads} {dtype}"}
        precision = block | {"weights": {dtype: 22_000_000 + heads}}
        save_run(tmp_path / name, hashes=hashes, precision=precision)
    assert "The same precision." in said(cli("report", "two", "three"))
    assert "NOT the same precision." in said(cli("report", "two", "half"))


def test_a_file_of_another_kind_is_not_a_damaged_record(cli: Cli, tmp_path: Path) -> None:
    save_run(tmp_path / "a", **scored(0.6))
    (tmp_path / "two.csv").write_text("text,label\nx,y\n")
    for arguments in (("two.csv",), ("a", "two.csv")):
        refused = cli("report", *arguments)
        assert refused.code == 2 and "damaged" not in refused.err
        assert "expected a run's folder, got the file two.csv" in " ".join(refused.err.split())


def test_a_killed_run_shows_its_best_score_and_its_curves(cli: Cli, tmp_path: Path) -> None:
    save_run(tmp_path / "run", status="running", metrics=None, time=None)
    lines: list[dict[str, Any]] = [
        {"step": step, "epoch": 1.0, "eval": {"step": step, "metric": "accuracy", "score": score}}
        for step, score in ((0, 0.5), (10, 0.7), (20, 0.6))
    ]
    lines.append({"step": 25, "epoch": 1.0, "loss": 0.5, "learning_rate": 1e-3})
    text = "\n".join(map(json.dumps, lines))
    (tmp_path / "run" / "steps.jsonl").write_text(f'{text}\n{{"step": 30, "lo')
    shown = cli("report", "run")
    assert shown.code == 0, shown.err
    assert "Interrupted after step 25; best so far: sparsegrad 70.0" in said(shown)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "sparsegrad train run --resume" in page and "at step 10" in page
    assert page.count("<figure>") >= 2


def test_evaluations_and_exports_have_reports(cli: Cli, tmp_path: Path) -> None:
    metric = {"accuracy": {"value": 0.9, "interval": [0.8, 1.0]}}
    evaluation = {"model": "runs/a", "about": "lora", "file": "x.csv", "rows": 10, "cut": 0}
    evaluation |= {"schema": 1, "resamples": 9, "metrics": metric}
    export = {"schema": 1, "to": "lora", "model": {"name": "m"}, "run": "runs/a"}
    for name, record in (("evaluation", evaluation), ("export", export)):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.json").write_text(json.dumps(record))
        shown = cli("report", name)
        assert shown.code == 0, shown.err
        assert (tmp_path / name / "report.html").is_file()
    shown = cli("report", "evaluation")
    assert "accuracy ×100 90.0 (95 % interval 80.0 to 100.0) on 10 rows" in said(shown)


def test_wrong_uses_of_report_are_refused(cli: Cli, tmp_path: Path) -> None:
    save_run(tmp_path / "a")
    save_run(tmp_path / "basis", command="calibrate")
    for arguments, words in (
        (("a", "a"), "expected different runs, got a twice"),
        (("a", "basis"), "basis holds a calibration, which has no scores"),
        (("a", "-o", "x"), "--output-dir is for several runs"),
        (("a", "nowhere"), "nowhere does not exist"),
    ):
        refused = cli("report", *arguments)
        assert refused.code == 2 and words in refused.flat, refused.err
