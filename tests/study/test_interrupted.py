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

TINY = (
    "task.train_limit=16",
    "task.eval_limit=8",
    "task.max_length=16",
    "train.per_device_train_batch_size=8",
    "train.max_steps=40",
    "train.logging_steps=1",
    "train.eval_strategy=steps",
    "train.eval_steps=10",
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
    "engine", [(), pytest.param(("--engine=slurm", "engine.slurm.cluster=local"), id="slurm")]
)
def test_a_killed_coordinator_leaves_no_orphan_and_continues(
    tmp_path: Path, engine: tuple[str, ...]
) -> None:
    folder = tmp_path / "c"
    lora, full = (folder / "cells" / f"builtin-acceptability-{m}-s42" for m in ("lora", "full"))
    first = compare(folder, "--jobs=1", *engine)
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
    second = compare(folder, *engine)
    told = second.communicate(timeout=900)[1]
    assert second.returncode == 0, told
    assert "[1/2] builtin:acceptability  lora  seed 42: done before" in told
    assert (lora / "run.json").read_bytes() == before
    assert steps(full) == list(
        range(1, 41)
    )  # continued from the checkpoint without repeating a step
    record = json.loads((folder / "compare.json").read_text())
    assert [cell["status"] for cell in record["cells"]] == ["done", "done"]
