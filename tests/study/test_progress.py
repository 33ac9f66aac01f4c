"""The estimate of the time that a study still takes, from its record and the logs of its runs."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sparsegrad_cli.cli.compare_progress import CompareProgress
from sparsegrad_cli.recipe.study import LoadedStudy, make_study
from sparsegrad_cli.records.study import StudyRecord
from sparsegrad_cli.study.progress import StudyNow, StudyProgress


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture(scope="module")
def study() -> LoadedStudy:
    """Two methods with two seeds, of 40 steps each."""
    return make_study(None, ("full", "lora"), 2, ("train.max_steps=40",))


def study_record(
    study: LoadedStudy, states: list[tuple[str, float | None]], *, jobs: int = 1, **more: Any
) -> StudyRecord:
    """Return a record with a status, and perhaps the seconds, of each run."""
    cells = [
        {
            "task": cell.task,
            "method": cell.label,
            "seed": cell.seed,
            "run_dir": f"cells/{cell.label}-{cell.seed}",
            "status": status,
            "run": None if took is None else {"status": status, "time": {"total_s": took}},
        }
        for cell, (status, took) in zip(study.cells, states, strict=True)
    ]
    return StudyRecord.model_validate({"cells": cells, "jobs": jobs, **more})


def write_step(folder: Path, study: LoadedStudy, number: int, step: int) -> None:
    cell = study.cells[number]
    run = folder / "cells" / f"{cell.label}-{cell.seed}"
    run.mkdir(parents=True, exist_ok=True)
    with (run / "steps.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "epoch": step / 250, "loss": 0.5}) + "\n")
        score = {"step": step, "score": 0.75, "metric": "accuracy", "loss": 0.4}
        file.write(json.dumps({"step": step, "epoch": step / 250, "eval": score}) + "\n")
        file.write('{"step": 9999, "lo')  # A line that is still being written.


def test_nothing_is_estimated_before_the_first_step(study: LoadedStudy, tmp_path: Path) -> None:
    now = StudyProgress(study, tmp_path, Clock()).now(
        study_record(study, [("running", None), *[("pending", None)] * 3])
    )
    assert (now.done, now.total, now.left_s) == (0, 4, None)


def test_steps_of_a_run_that_trains_give_the_first_estimate(
    study: LoadedStudy, tmp_path: Path
) -> None:
    clock = Clock()
    progress = StudyProgress(study, tmp_path, clock)
    record = study_record(study, [("running", None), *[("pending", None)] * 3])
    progress.now(record)
    clock.seconds += 30.0
    write_step(tmp_path, study, 0, 10)
    now = progress.now(record)
    # A quarter in 30 s: 90 s are left of this run, and 120 s of each of the three others.
    assert now.left_s == pytest.approx(90 + 3 * 120)
    (run,) = now.running
    assert (run.step, run.steps, run.share) == (10, 40, 0.25)
    assert (run.loss, run.score, run.metric) == (0.5, 0.75, "accuracy")


@pytest.mark.parametrize(("jobs", "left"), [(1, 130.0), (2, 65.0), (9, 65.0)])
def test_finished_runs_give_the_estimate_of_their_method(
    study: LoadedStudy, tmp_path: Path, jobs: int, left: float
) -> None:
    order = [cell.label for cell in study.cells]
    took = {"full": 50.0, "lora": 80.0}
    first = [order.index("full"), order.index("lora")]
    states: list[tuple[str, float | None]] = [
        ("done", took[label]) if at in first else ("pending", None)
        for at, label in enumerate(order)
    ]
    waiting = [at for at, (status, _) in enumerate(states) if status == "pending"]
    assert sorted(order[at] for at in waiting) == ["full", "lora"]
    record = study_record(study, states, jobs=jobs)
    now: StudyNow = StudyProgress(study, tmp_path, Clock()).now(record)
    assert (now.done, now.total) == (2, 4)
    assert now.left_s == pytest.approx(left)


def test_trials_of_tuning_count_as_runs(study: LoadedStudy, tmp_path: Path) -> None:
    trial = {"number": 0, "settings": {}, "status": "done", "seconds": 20.0}
    series = [
        {"task": study.cells[0].task, "method": label, "trials": trials, "seconds": 20.0}
        for label, trials in (("full", [trial]), ("lora", []))
    ]
    tuning = {"trials": 2, "seeds": [1], "keys": [], "series": series}
    record = study_record(study, [("pending", None)] * 4, tuning=tuning)
    now = StudyProgress(study, tmp_path, Clock()).now(record)
    assert (now.done, now.total) == (1, 8)
    assert now.left_s == pytest.approx(20.0 * 7)  # Three trials and four runs.


@pytest.mark.parametrize("width", [80, 60])
def test_the_screen_shows_all_runs_and_each_that_trains(
    study: LoadedStudy, tmp_path: Path, width: int
) -> None:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    write_step(tmp_path, study, 1, 20)
    record = study_record(study, [("done", 50.0), ("running", None), *[("pending", None)] * 2])
    with CompareProgress(study, tmp_path, console=console, live=True) as progress:
        progress.update(record)
        console.print(progress.shown())
    file: Any = console.file
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", file.getvalue()).splitlines()
    assert all(len(line) <= width for line in lines)
    assert any("1/4 runs" in line and "ETA" in line and "elapsed" in line for line in lines)
    run = next(line for line in lines if "20/40 steps" in line)
    assert "seed" in run or study.cells[1].label in run


def test_a_pipe_gets_a_line_after_each_run(
    study: LoadedStudy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with CompareProgress(study, tmp_path, live=False) as progress:
        progress.update(study_record(study, [("running", None), *[("pending", None)] * 3]))
        progress.update(study_record(study, [("done", 50.0), *[("pending", None)] * 3]))
        progress.update(study_record(study, [("done", 50.0), *[("pending", None)] * 3]))
    cell = study.cells[0]
    shown = re.sub(r"elapsed [\d:]+", "elapsed ...", capsys.readouterr().err)
    assert shown.splitlines() == [
        "compare: 0 of 4 runs done, elapsed ..., ETA -:--",
        f"  {cell.task}  {cell.label}  seed {cell.seed}: done, 50 s",
        "compare: 1 of 4 runs done, elapsed ..., ETA 2:30",
    ]
