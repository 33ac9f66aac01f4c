"""A study whose coordinator is killed continues where it stopped, and repeats no run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.paths import REPO

from sparsegrad_cli.io.locks import owner_of
from sparsegrad_cli.study.runs import find_run

STEPS = 200  # many, so that the kill comes before the end
TINY = (
    "task.train_limit=16",
    "task.eval_limit=8",
    "task.max_length=16",
    "train.per_device_train_batch_size=8",
    f"train.max_steps={STEPS}",
    "train.logging_steps=1",
    "train.eval_strategy=steps",
    "train.eval_steps=50",
)


def compare(folder: Path, *more: str) -> subprocess.Popen[str]:
    command = ("compare", "--methods", "lora,full", "--seeds", "1", "-o", str(folder), *TINY, *more)
    return subprocess.Popen(
        [sys.executable, "-m", "sparsegrad_cli", *command],
        env=os.environ | {"PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Wait for a condition, as long as a process is alive."""
    while not condition():
        if process.poll() is not None:
            pytest.fail(process.communicate()[1])
        time.sleep(0.05)


def steps(run: Path) -> list[int]:
    """The steps that a run has logged, in order."""
    if not (run / "steps.jsonl").is_file():
        return []
    lines = (run / "steps.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return [line["step"] for line in found if "learning_rate" in line]


@pytest.mark.parametrize(
    "engine",
    [
        (),
        pytest.param(
            ("--engine=slurm", "engine.slurm.cluster=local"), id="slurm", marks=pytest.mark.slow
        ),
    ],
)
def test_a_killed_coordinator_leaves_no_orphan_and_continues(
    request: pytest.FixtureRequest, tmp_path: Path, small_bert: str, engine: tuple[str, ...]
) -> None:
    if not engine:  # submitit finds its jobs by the IDs of real processes
        request.getfixturevalue("warm_python")
    folder, settings = tmp_path / "c", (f"model={small_bert}", *engine)
    lora, full = (folder / "cells" / f"builtin-acceptability-{m}-s42" for m in ("lora", "full"))
    first = compare(folder, "--jobs=1", *settings)
    wait_until(lambda: (run := find_run(lora)) is not None and run.status == "done", first)
    before = (lora / "run.json").read_bytes()
    wait_until(lambda: len(steps(full)) > 1, first)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    if not engine:  # the run saves and ends by itself; Slurm's goes on
        while owner_of(full) is not None:
            time.sleep(0.05)
        left = find_run(full)
        assert left is not None and left.status == "interrupted"
    second = compare(folder, *settings)
    told = second.communicate(timeout=900)[1]
    assert second.returncode == 0, told
    assert "[1/2] builtin:acceptability  lora  seed 42: done before" in told
    assert (lora / "run.json").read_bytes() == before
    # It continued from the checkpoint without repeating a step.
    assert steps(full) == list(range(1, STEPS + 1))
    record = json.loads((folder / "compare.json").read_text())
    assert [cell["status"] for cell in record["cells"]] == ["done", "done"]
