"""A resumed run equals the run that was never stopped, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.adapter_paths import adapter_path
from support.cli_runs import METHODS, SMALL, Cli
from support.paths import REPO

# The sampler knows no methods: grouping by length once is enough.
CASES = [*((name, "random") for name in METHODS), ("lora", "group_by_length")]


def tensors_equal(a: Path, b: Path) -> bool:
    left, right = load_file(a), load_file(b)
    return set(left) == set(right) and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize(("method", "sampling"), CASES)
def test_resumed_run_equals_the_uninterrupted_run_bit_for_bit(
    cli: Cli, tmp_path: Path, method: str, sampling: str
) -> None:
    common = (
        *METHODS[method],
        *SMALL,
        f"train.train_sampling_strategy={sampling}",
        # 40 rows in batches of 4 x 2: five steps an epoch, so step 6 is in the second one
        "task.train_limit=40",
        "train.per_device_train_batch_size=4",
        "train.gradient_accumulation_steps=2",
        "train.max_steps=6",
        "train.eval_steps=3",
        "train.save_total_limit=5",
        "train.lr_scheduler_type=linear",
    )
    assert cli("train", *common, "-o", "whole").code == 0
    whole = tmp_path / "whole"
    half = tmp_path / "half"
    shutil.copytree(whole, half)
    shutil.rmtree(half / "checkpoint-6")
    shutil.rmtree(half / "adapter")
    resumed = cli("train", *common, "-o", "half", "--resume")
    assert resumed.code == 0, resumed.err
    one, other = (json.loads((d / "run.json").read_text()) for d in (whole, half))
    assert other["metrics"]["history"] == one["metrics"]["history"]
    assert other["hashes"]["order"] == one["hashes"]["order"]
    for name in ("trainable.safetensors", "optimizer.safetensors"):
        assert tensors_equal(whole / "checkpoint-6" / name, half / "checkpoint-6" / name)


def test_training_twice_gives_the_same_bits(cli: Cli, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert cli("train", *SMALL, "-o", name).code == 0
    assert tensors_equal(
        adapter_path(tmp_path / "a"),
        adapter_path(tmp_path / "b"),
    )
    a, b = (json.loads((tmp_path / n / "run.json").read_text()) for n in ("a", "b"))
    assert a["memory"] | {"phases": None} == b["memory"] | {"phases": None}
    for phase, measured in a["memory"]["phases"].items():
        assert measured["categories"] == b["memory"]["phases"][phase]["categories"]


def test_resume_refuses_another_recipe(cli: Cli) -> None:
    assert cli("train", "method=full", *SMALL, "-o", "run").code == 0
    other = cli("train", "method=full", *SMALL, "train.learning_rate=1", "-o", "run", "--resume")
    assert other.code == 2
    assert "another recipe" in other.flat


def test_damaged_checkpoint_is_named_and_the_previous_one_used(cli: Cli, tmp_path: Path) -> None:
    command = ("train", "method=full", *SMALL, "-o", "run", "train.save_total_limit=5")
    assert cli(*command).code == 0
    folder = tmp_path / "run" / "checkpoint-6"
    content = (folder / "trainable.safetensors").read_bytes()
    (folder / "trainable.safetensors").write_bytes(content[:1000])
    shutil.rmtree(tmp_path / "run" / "adapter")  # or the run would be done
    resumed = cli(*command, "--resume")
    assert resumed.code == 0, resumed.err
    assert "checkpoint-6 is damaged" in resumed.flat and "checkpoint-3 is used" in resumed.flat
    assert (folder / "trainable.safetensors").read_bytes() == content


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPO)}
    return subprocess.Popen(
        [sys.executable, "-m", "sparsegrad_cli", "train", *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_lines(path: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and len(path.read_text().splitlines()) >= count:
            return
        time.sleep(0.05)
    raise AssertionError(f"no progress: {process.communicate()}")


def test_ctrl_c_saves_a_checkpoint_exits_130_and_can_be_resumed(cli: Cli, tmp_path: Path) -> None:
    settings = (
        "method=full",
        *SMALL,
        "train.max_steps=400",
        "train.eval_steps=200",
        "-o",
        "run",
    )
    process = start(tmp_path, *settings)
    wait_for_lines(tmp_path / "run" / "steps.jsonl", 4, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err and "--resume" in err
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["status"] == "interrupted"
    stopped = int(next((tmp_path / "run").glob("checkpoint-*")).name.removeprefix("checkpoint-"))
    assert stopped >= 4
    # The same recipe goes on; 400 steps are too many to wait for, so stop it again.
    process = start(tmp_path, "run", "--resume")
    lines = len((tmp_path / "run" / "steps.jsonl").read_text().splitlines())
    wait_for_lines(tmp_path / "run" / "steps.jsonl", lines + 2, process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    steps = [
        json.loads(line)["step"]
        for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()
    ]
    assert steps == sorted(steps)
