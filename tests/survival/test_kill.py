"""Kill -9 at any moment, --resume: the final weights are the undisturbed run's, bit for bit."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from safetensors.torch import load_file
from support.kill_points import MOMENTS
from support.survival_runs import (
    CALIBRATING,
    COMMON,
    EXPORTING,
    METHODS,
    NEEDS_BASIS,
    TRAINING,
    Bench,
    Cell,
    flat,
    record,
    weights,
)

from sparsegrad_cli.io.locks import owner_of

# A cell for every kind of moment and of method; the whole matrix is slow.
FEW = (
    ("full", "checkpoint-torn"),
    ("meprop", "dropping"),
    ("core static", "trained"),
    ("core dynamic", "interrupted"),
    ("core refresh", "calibrated"),
)
ALL = [
    (method, moment)
    for method in METHODS
    for moment in TRAINING
    if moment not in CALIBRATING or method in NEEDS_BASIS
]


def check(cell: Cell, moment: str) -> None:
    assert cell.code == (130 if moment.startswith("interrupted") else -9)
    assert cell.weights and cell.records, cell.said
    assert (cell.after is None) == (moment == "reporting"), cell.said


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


def test_a_half_written_export_is_not_taken_for_one(bench: Bench) -> None:
    """Not by its name, nor by what it says of itself; and it is in nobody's way."""
    run = bench.fresh()
    shutil.copytree(bench.undisturbed("core static"), run)
    command = ("export", str(run), "--to", "merged")
    assert bench.killer.run(*command, moment="export-torn").code == -9
    assert not list(run.glob("export-*"))
    (partial,) = run.glob(".export-merged*.partial")
    assert not (partial / "export.json").exists()
    with pytest.raises(SafetensorError):
        load_file(partial / "model.safetensors")
    generated = bench.killer.run("generate", str(run / "export-merged"), "--prompt", "a")
    assert generated.code == 2 and "export-merged" in flat(generated)
    assert bench.killer.run(*command).code == 0
    assert [path.name for path in run.glob("*export-*")] == ["export-merged"]
    assert json.loads((run / "export-merged" / "export.json").read_text())["to"] == "merged"
    assert load_file(run / "export-merged" / "model.safetensors")


def test_every_moment_is_in_the_matrix() -> None:
    worlds = {name for name in MOMENTS if name.startswith(("short-of", "reporting-"))}
    worlds |= {"small-files", "clock-back"}
    worlds |= {name for name in MOMENTS if name.startswith("interrupted-")}  # test_stopping.py
    assert set(MOMENTS) == set(TRAINING) | set(EXPORTING) | worlds


def test_a_resumed_run_keeps_what_was_measured_before(bench: Bench) -> None:
    """Step times, seconds and the memory of the run before; it trains no step itself."""
    run = bench.fresh()
    assert bench.train("full", run, moment="checkpoint-renamed", count=3).code == -9
    before = measured(run / "checkpoint-6")
    assert len(before["steps_s"]) == 6 and before["train_s"] > sum(before["steps_s"]) > 0
    assert {"forward", "backward", "optimizer"} <= before["memory"]["phases"].keys()
    # Early stopping ends the run at step 8: the last resumption trains nothing.
    assert bench.train("full", run, "--resume", moment="checkpoint-renamed").code == -9
    between = measured(run / "checkpoint-8")
    assert between["steps_s"][:6] == before["steps_s"] and len(between["steps_s"]) == 8
    assert between["train_s"] > before["train_s"]
    assert bench.train("full", run, "--resume").code == 0
    found = record(run)
    assert found["memory"] == between["memory"]
    assert found["time"]["step_median_s"] == statistics.median(between["steps_s"])
    assert found["time"]["train_s"] >= between["train_s"]


def measured(checkpoint: Path) -> dict[str, Any]:
    state = json.loads((checkpoint / "state.json").read_text())
    found: dict[str, Any] = state["measured"]
    return found


@pytest.mark.parametrize("moment", ["reporting-begins", "reporting-interrupted"])
def test_ctrl_c_once_a_run_is_done_leaves_it_done(bench: Bench, moment: str) -> None:
    run = bench.fresh()
    ended = bench.train("full", run, moment=moment)
    assert ended.code == 130 and f"sparsegrad report {run}" in flat(ended)
    check_done(bench, run)


def test_a_report_that_cannot_be_written_leaves_a_run_done(bench: Bench) -> None:
    """The disk has room for the words, and not for the page."""
    run = bench.fresh()
    ended = bench.train("full", run, moment="reporting-full", count=16)
    said = flat(ended)
    assert ended.code == 1 and "the run is done, but its report could not be written" in said
    assert f"sparsegrad report {run}" in said
    check_done(bench, run)


def check_done(bench: Bench, run: Path) -> None:
    """Done, unlocked, without half a report; and a report can be had."""
    found = record(run)
    assert (found["status"], found["error"]) == ("done", None)
    assert not (run / ".lock").exists() and not (run / "report.html").exists()
    assert not [path.name for path in run.iterdir() if path.name.endswith(".tmp")]
    assert bench.killer.run("report", str(run)).code == 0
    assert (run / "report.html").is_file() and (run / "report.md").is_file()


@pytest.mark.parametrize("more", [(), pytest.param(("train.max_steps=6",), marks=pytest.mark.slow)])
def test_a_run_that_came_to_its_end_takes_no_step_more(bench: Bench, more: tuple[str, ...]) -> None:
    """By early stopping, or by its last step in the middle of an epoch."""
    run, settings = bench.fresh(), bench.settings("lora", *more)
    whole = bench.fresh() if more else bench.undisturbed("lora")
    if more:
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


def test_an_epoch_that_ends_with_a_stop_is_evaluated_when_the_run_goes_on(bench: Bench) -> None:
    """Ctrl-C in the epoch's last batch: its step is saved, and --resume evaluates it first."""
    train = ["eval_strategy=epoch", "eval_steps=null", "save_strategy=steps", "save_steps=4"]
    train += ["max_steps=6", "load_best_model_at_end=false"]
    settings = bench.settings("lora", *(f"train.{text}" for text in train))
    whole, run = bench.fresh(), bench.fresh()
    assert bench.killer.run("train", *settings, "-o", str(whole)).code == 0
    command = ("train", *settings, "-o", str(run))
    assert bench.killer.run(*command, moment="interrupted", count=10).code == 130
    state = json.loads((run / "checkpoint-4" / "state.json").read_text())
    assert state["progress"]["evaluation_due"]
    assert bench.killer.run(*command, "--resume").code == 0
    assert weights(run) == weights(whole) and record(run)["resumed_from"] == 4
    assert record(run)["metrics"] == record(whole)["metrics"]
    assert [found["step"] for found in record(run)["metrics"]["history"]] == [0, 4, 6]


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
