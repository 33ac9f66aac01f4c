"""Kill -9 at any moment, --resume: the final weights are the undisturbed run's, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from killing import MOMENTS
from surviving import (
    CALIBRATING,
    COMMON,
    EXPORTING,
    METHODS,
    NEEDS_BASIS,
    TRAINING,
    Bench,
    Cell,
    record,
    weights,
)

from sparsegrad_cli.locking import owner_of

# A cell for every kind of moment, every method once or more; the whole matrix is slow.
FEW = (
    ("full", "checkpoint-torn"),
    ("lora", "checkpoint-renamed"),
    ("meprop", "dropping"),
    ("core static", "trained"),
    ("core dynamic", "interrupted"),
    ("core refresh", "calibrated"),
    ("materialized", "step"),
)
ALL = [
    (method, moment)
    for method in METHODS
    for moment in TRAINING
    if moment not in CALIBRATING or method in NEEDS_BASIS
]


def check(cell: Cell, moment: str) -> None:
    assert cell.code == (130 if moment == "interrupted" else -9)
    assert cell.weights and cell.records, cell.said


def test_the_undisturbed_run_is_one_that_a_resumption_could_get_wrong(bench: Bench) -> None:
    """Stopped early, its best evaluation is not its last, its last batch of an epoch is short."""
    run = record(bench.undisturbed("full"))
    assert run["time"]["steps"] == 8 < 24
    assert run["metrics"]["best"]["step"] == 4
    assert "train.gradient_accumulation_steps=3" in COMMON and run["task"]["train_examples"] == 48


@pytest.mark.parametrize(("method", "moment"), FEW)
def test_a_killed_run_goes_on_bit_for_bit(bench: Bench, method: str, moment: str) -> None:
    check(bench.cell(method, moment), moment)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "moment"), ALL)
def test_the_whole_matrix(bench: Bench, method: str, moment: str) -> None:
    check(bench.cell(method, moment), moment)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_killed_three_times(bench: Bench, method: str) -> None:
    cell = bench.cell(method, "checkpoint-written", "evaluated", "adapter-torn")
    assert cell.code == -9 and cell.weights and cell.records, cell.said


@pytest.mark.slow
@pytest.mark.parametrize("moment", EXPORTING)
@pytest.mark.parametrize("method", METHODS)
def test_a_killed_export_is_made_by_the_same_command(
    bench: Bench, method: str, moment: str
) -> None:
    check(bench.export_cell(method, moment), moment)


def test_an_export_killed_before_its_rename_leaves_nothing_in_the_way(bench: Bench) -> None:
    check(bench.export_cell("core static", "export-written"), "export-written")


def test_every_moment_is_in_the_matrix() -> None:
    worlds = {"short-of-memory", "short-of-memory-later", "small-files", "clock-back"}
    assert set(MOMENTS) == set(TRAINING) | set(EXPORTING) | worlds


def test_a_run_that_came_to_its_end_takes_no_step_more(bench: Bench) -> None:
    """By early stopping, or by its last step in the middle of an epoch."""
    for more in ((), ("train.max_steps=6",)):
        whole, run = bench.fresh(), bench.fresh()
        settings = bench.settings("lora", *more)
        assert bench.killer.run("train", *settings, "-o", str(whole)).code == 0
        ended = bench.killer.run("train", *settings, "-o", str(run), moment="adapter-renamed")
        assert ended.code == -9
        steps = record(whole)["time"]["steps"]
        assert (run / f"checkpoint-{steps}").is_dir()
        assert bench.killer.run("train", *settings, "-o", str(run), "--resume").code == 0
        assert weights(run) == weights(whole)
        mine, theirs = record(run), record(whole)
        assert mine["metrics"] == theirs["metrics"] and mine["time"]["steps"] == steps
        assert mine["resumed_from"] == steps and theirs["resumed_from"] is None
        # What was measured before the kill is not forgotten either.
        assert mine["memory"]["phases"].keys() == theirs["memory"]["phases"].keys()
        assert mine["time"]["step_median_s"] > 0


def test_a_run_may_be_moved_between_kill_and_resumption(bench: Bench) -> None:
    """Its best checkpoint is looked for where it is now, not where it was."""
    run, moved = bench.fresh(), bench.fresh()
    assert bench.train("meprop", run, moment="trained").code == -9
    shutil.move(run, moved)
    run.mkdir()  # something else stands there now
    ended = bench.killer.run("train", str(moved), "--resume")
    assert ended.code == 0, ended.err
    assert weights(moved) == weights(bench.undisturbed("meprop"))


def test_a_killed_run_leaves_what_says_so(bench: Bench, tmp_path: Path) -> None:
    run = bench.fresh()
    assert bench.train("full", run, moment="checkpoint-begun", count=2).code == -9
    assert record(run)["status"] == "running"
    assert (run / ".lock").is_file() and owner_of(run) is None
    assert sorted(path.name for path in run.glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-4.partial",
    ]
    shown = bench.killer.run("report", str(run), "--json")
    assert shown.code == 0 and json.loads(shown.out)["status"] == "interrupted"
    assert "was killed" in json.loads(shown.out)["error"]["what"]
    again = bench.train("full", run)
    assert again.code == 2 and "--resume" in again.err
    manifest = json.loads((run / "checkpoint-2" / "manifest.json").read_text())
    names = {path.name for path in (run / "checkpoint-2").iterdir()} - {"manifest.json"}
    assert set(manifest["files"]) == names
    assert bench.train("full", run, "--resume").code == 0
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-4"]
