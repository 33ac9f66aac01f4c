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
from support.cli_runs import SMALL
from support.paths import REPO
from support.small_runs import base_folder, data_folder, record, train

# The sampler does not depend on the method, so grouping by length is tested once.
CASES = {
    "full": ("method=full",),
    "lora": ("method=lora", "method.rank=2", "method.dropout=0.1"),
    "lora, group_by_length": (
        "method=lora",
        "method.rank=2",
        "method.dropout=0.1",
        "train.train_sampling_strategy=group_by_length",
    ),
    "meprop": ("method=meprop", "method.density=0.05"),
    "materialized": ("method.form=materialized", "method.density=0.05"),
    "core": ("method.form=core", "method.density=0.05", "method.rank=7"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the folders of a tiny model and of its data."""
    folder = tmp_path_factory.mktemp("inputs")
    return base_folder(folder / "base"), data_folder(folder / "data")


def tensors_equal(a: Path, b: Path) -> bool:
    left, right = load_file(a), load_file(b)
    return set(left) == set(right) and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize("case", CASES)
def test_resumed_run_equals_the_uninterrupted_run_bit_for_bit(
    folders: tuple[Path, Path], tmp_path: Path, case: str
) -> None:
    settings = (
        *CASES[case],
        # 40 rows in batches of 4 x 2: five steps per epoch, so step 6 is in the second epoch.
        "task.train_limit=40",
        "train.per_device_train_batch_size=4",
        "train.gradient_accumulation_steps=2",
        "train.save_total_limit=5",
        "train.lr_scheduler_type=linear",
    )
    whole = train(tmp_path / "whole", *folders, *settings)
    half = Path(shutil.copytree(whole, tmp_path / "half"))
    shutil.rmtree(half / "checkpoint-6")
    shutil.rmtree(half / "adapter")
    train(half, *folders, *settings, resume=True)
    one, other = record(whole), record(half)
    assert other["resumed_from"] == 3
    assert other["metrics"]["history"] == one["metrics"]["history"]
    assert other["hashes"]["order"] == one["hashes"]["order"]
    for name in ("trainable.safetensors", "optimizer.safetensors"):
        assert tensors_equal(whole / "checkpoint-6" / name, half / "checkpoint-6" / name)


def test_training_twice_gives_the_same_bits(folders: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = (train(tmp_path / name, *folders, *CASES["core"]) for name in ("a", "b"))
    assert tensors_equal(adapter_path(a), adapter_path(b))
    measured, again = record(a)["memory"], record(b)["memory"]
    assert measured | {"phases": None} == again | {"phases": None}
    for phase, found in measured["phases"].items():
        assert found["categories"] == again["phases"][phase]["categories"]


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


def test_ctrl_c_saves_a_checkpoint_exits_130_and_can_be_resumed(tmp_path: Path) -> None:
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
