"""After kill -9 and --resume, final weights equal those of the uninterrupted run bit for bit."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from safetensors.torch import load_file
from support.kill_points import KILL_POINTS
from support.survival_runs import (
    CALIBRATION_POINTS,
    COMMON,
    EXPORT_POINTS,
    METHODS,
    NEEDS_BASIS,
    TRAINING_POINTS,
    Recovery,
    Workspace,
    flat,
    record,
    weights,
)

from sparsegrad_cli.io.locks import owner_of

# Every kill point and every method at least once; the whole matrix is slow.
FEW = (
    ("full", "checkpoint-torn"),
    ("meprop", "dropping"),
    ("core static", "trained"),
    ("core dynamic", "interrupted"),
    ("core refresh", "calibrated"),
)
ALL = [
    (method, point)
    for method in METHODS
    for point in TRAINING_POINTS
    if point not in CALIBRATION_POINTS or method in NEEDS_BASIS
]


def check(cell: Recovery, point: str) -> None:
    assert cell.code == (130 if point.startswith("interrupted") else -9)
    assert cell.weights and cell.records, cell.said
    assert (cell.after is None) == (point == "reporting"), cell.said


def test_uninterrupted_run_has_what_a_resumption_could_get_wrong(workspace: Workspace) -> None:
    """It stops early, its best evaluation is not the last, and an epoch ends with a short batch."""
    run = record(workspace.uninterrupted_run("full"))
    assert run["time"]["steps"] == 8 < 24
    assert run["metrics"]["best"]["step"] == 4
    assert "train.gradient_accumulation_steps=3" in COMMON and run["task"]["train_examples"] == 48


@pytest.mark.parametrize(("method", "point"), FEW)
def test_killed_run_resumes_bit_for_bit(workspace: Workspace, method: str, point: str) -> None:
    check(workspace.kill_and_resume(method, point), point)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "point"), ALL)
def test_the_whole_matrix(workspace: Workspace, method: str, point: str) -> None:
    check(workspace.kill_and_resume(method, point), point)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_run_killed_three_times_resumes_bit_for_bit(workspace: Workspace, method: str) -> None:
    cell = workspace.kill_and_resume(method, "checkpoint-written", "evaluated", "adapter-torn")
    assert cell.code == -9 and cell.weights and cell.records, cell.said


@pytest.mark.slow
@pytest.mark.parametrize("point", EXPORT_POINTS)
@pytest.mark.parametrize("method", METHODS)
def test_killed_export_is_completed_by_the_same_command(
    workspace: Workspace, method: str, point: str
) -> None:
    check(workspace.kill_and_repeat_export(method, point), point)


def test_half_written_export_is_not_loaded(workspace: Workspace) -> None:
    """Neither its name nor its files look like a complete export, and a new export replaces it."""
    run = workspace.new_run()
    shutil.copytree(workspace.uninterrupted_run("core static"), run)
    command = ("export", str(run), "--to", "merged")
    assert workspace.fork_server.run(*command, point="export-torn").code == -9
    assert not list(run.glob("export-*"))
    (partial,) = run.glob(".export-merged*.partial")
    assert not (partial / "export.json").exists()
    with pytest.raises(SafetensorError):
        load_file(partial / "model.safetensors")
    generated = workspace.fork_server.run("generate", str(run / "export-merged"), "--prompt", "a")
    assert generated.code == 2 and "export-merged" in flat(generated)
    assert workspace.fork_server.run(*command).code == 0
    assert [path.name for path in run.glob("*export-*")] == ["export-merged"]
    assert json.loads((run / "export-merged" / "export.json").read_text())["to"] == "merged"
    assert load_file(run / "export-merged" / "model.safetensors")


def test_every_kill_point_is_in_the_matrix() -> None:
    worlds = {name for name in KILL_POINTS if name.startswith(("short-of", "reporting-"))}
    worlds |= {"small-files", "clock-back"}
    worlds |= {name for name in KILL_POINTS if name.startswith("interrupted-")}  # test_stopping.py
    assert set(KILL_POINTS) == set(TRAINING_POINTS) | set(EXPORT_POINTS) | worlds


def test_resumed_run_keeps_earlier_measurements(workspace: Workspace) -> None:
    """It keeps step times, seconds and memory of the first process, and trains no step itself."""
    run = workspace.new_run()
    assert workspace.train("full", run, point="checkpoint-renamed", count=3).code == -9
    before = measured(run / "checkpoint-6")
    assert len(before["steps_s"]) == 6 and before["train_s"] > sum(before["steps_s"]) > 0
    assert {"forward", "backward", "optimizer"} <= before["memory"]["phases"].keys()
    # Early stopping ends the run at step 8: the last resumption trains nothing.
    assert workspace.train("full", run, "--resume", point="checkpoint-renamed").code == -9
    between = measured(run / "checkpoint-8")
    assert between["steps_s"][:6] == before["steps_s"] and len(between["steps_s"]) == 8
    assert between["train_s"] > before["train_s"]
    assert workspace.train("full", run, "--resume").code == 0
    found = record(run)
    assert found["memory"] == between["memory"]
    assert found["time"]["step_median_s"] == statistics.median(between["steps_s"])
    assert found["time"]["train_s"] >= between["train_s"]


def measured(checkpoint: Path) -> dict[str, Any]:
    state = json.loads((checkpoint / "state.json").read_text())
    found: dict[str, Any] = state["measured"]
    return found


@pytest.mark.parametrize("point", ["reporting-begins", "reporting-interrupted"])
def test_ctrl_c_after_the_end_leaves_the_run_finished(workspace: Workspace, point: str) -> None:
    run = workspace.new_run()
    ended = workspace.train("full", run, point=point)
    assert ended.code == 130 and f"sparsegrad report {run}" in flat(ended)
    check_done(workspace, run)


def test_failed_report_leaves_the_run_finished(workspace: Workspace) -> None:
    """The disk has room for report.md but not for report.html."""
    run = workspace.new_run()
    ended = workspace.train("full", run, point="reporting-full", count=16)
    said = flat(ended)
    assert ended.code == 1 and "the run is done, but its report could not be written" in said
    assert f"sparsegrad report {run}" in said
    check_done(workspace, run)


def check_done(workspace: Workspace, run: Path) -> None:
    """Check that the run is done and unlocked, has no partial report, and can be reported."""
    found = record(run)
    assert (found["status"], found["error"]) == ("done", None)
    assert not (run / ".lock").exists() and not (run / "report.html").exists()
    assert not [path.name for path in run.iterdir() if path.name.endswith(".tmp")]
    assert workspace.fork_server.run("report", str(run)).code == 0
    assert (run / "report.html").is_file() and (run / "report.md").is_file()


@pytest.mark.parametrize("more", [(), pytest.param(("train.max_steps=6",), marks=pytest.mark.slow)])
def test_run_at_its_end_trains_no_further_step(workspace: Workspace, more: tuple[str, ...]) -> None:
    """The run ended by early stopping, or by max_steps within an epoch."""
    run, settings = workspace.new_run(), workspace.settings("lora", *more)
    whole = workspace.new_run() if more else workspace.uninterrupted_run("lora")
    if more:
        assert workspace.fork_server.run("train", *settings, "-o", str(whole)).code == 0
    ended = workspace.fork_server.run("train", *settings, "-o", str(run), point="adapter-renamed")
    assert ended.code == -9
    steps = record(whole)["time"]["steps"]
    assert (run / f"checkpoint-{steps}").is_dir()
    assert workspace.fork_server.run("train", *settings, "-o", str(run), "--resume").code == 0
    assert weights(run) == weights(whole)
    mine, theirs = record(run), record(whole)
    assert mine["metrics"] == theirs["metrics"] and mine["time"]["steps"] == steps
    assert mine["resumed_from"] == steps and theirs["resumed_from"] is None


def test_epoch_ended_by_a_stop_is_evaluated_on_resume(
    workspace: Workspace,
) -> None:
    """After Ctrl-C in an epoch's last batch, its step is saved and --resume evaluates it first."""
    train = ["eval_strategy=epoch", "eval_steps=null", "save_strategy=steps", "save_steps=4"]
    train += ["max_steps=6", "load_best_model_at_end=false"]
    settings = workspace.settings("lora", *(f"train.{text}" for text in train))
    whole, run = workspace.new_run(), workspace.new_run()
    assert workspace.fork_server.run("train", *settings, "-o", str(whole)).code == 0
    command = ("train", *settings, "-o", str(run))
    assert workspace.fork_server.run(*command, point="interrupted", count=10).code == 130
    state = json.loads((run / "checkpoint-4" / "state.json").read_text())
    assert state["progress"]["evaluation_due"]
    assert workspace.fork_server.run(*command, "--resume").code == 0
    assert weights(run) == weights(whole) and record(run)["resumed_from"] == 4
    assert record(run)["metrics"] == record(whole)["metrics"]
    assert [found["step"] for found in record(run)["metrics"]["history"]] == [0, 4, 6]


def test_killed_run_can_be_moved_before_resuming(workspace: Workspace) -> None:
    """The best checkpoint is searched for in the new folder."""
    run, moved = workspace.new_run(), workspace.new_run()
    assert workspace.train("meprop", run, point="trained").code == -9
    shutil.move(run, moved)
    run.mkdir()  # the old path now holds another folder
    ended = workspace.fork_server.run("train", str(moved), "--resume")
    assert ended.code == 0, ended.err
    assert weights(moved) == weights(workspace.uninterrupted_run("meprop"))


def test_killed_run_is_reported_as_interrupted(workspace: Workspace, tmp_path: Path) -> None:
    run = workspace.new_run()
    assert workspace.train("full", run, point="checkpoint-begun", count=2).code == -9
    assert record(run)["status"] == "running"
    assert (run / ".lock").is_file() and owner_of(run) is None
    assert sorted(path.name for path in run.glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-4.partial",
    ]
    shown = workspace.fork_server.run("report", str(run), "--json")
    assert shown.code == 0 and json.loads(shown.out)["status"] == "interrupted"
    assert "was killed" in json.loads(shown.out)["error"]["what"]
    again = workspace.train("full", run)
    assert again.code == 2 and "--resume" in again.err
    manifest = json.loads((run / "checkpoint-2" / "manifest.json").read_text())
    names = {path.name for path in (run / "checkpoint-2").iterdir()} - {"manifest.json"}
    assert set(manifest["files"]) == names
    assert workspace.train("full", run, "--resume").code == 0
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-4"]
