"""Data loader workers give the same run, however the platform starts processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.adapter_paths import adapter_path
from support.chat_models import chat_model_folder
from support.cli_runs import Cli
from support.small_runs import base_folder, data_folder, record

# What a platform does whose default is not fork: macOS, Windows, and Python 3.14 everywhere.
COMMAND = """
import multiprocessing, sys
from sparsegrad_cli.cli.app import main
if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv.pop(1), force=True)
    sys.argv[0] = "sparsegrad"
    main()
"""
COMMON = (
    "train.max_steps=2",
    "train.per_device_train_batch_size=4",
    "train.logging_steps=1",
    "train.use_cpu=true",
    "method=lora",
)


def arguments(folder: Path, task: str) -> tuple[str, ...]:
    """Write model and data of a task; return the overrides that name them."""
    if task == "csv":
        base_folder(folder / "base")
        data_folder(folder / "data")
        return ("model=base", "task={name: csv, path: data, max_length: 16}", *COMMON)
    chat_model_folder(folder / "base", positions=128)
    line = '{{"prompt": "{0}?", "completion": "yes yes {0}"}}\n'
    for name, count in (("train", 24), ("validation", 4)):
        text = "".join(line.format(n) for n in range(count))
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    task = "task={name: chat, path: ., max_length: 96, chat: {packing: pack}}"
    return ("model=base", task, *COMMON)


def train_with_workers(folder: Path, method: str, settings: tuple[str, ...]) -> Path:
    """Train by the command line in another process, with one data loader worker."""
    (folder / "command.py").write_text(COMMAND, encoding="utf-8")
    command = [
        sys.executable,
        str(folder / "command.py"),
        method,
        "train",
        *settings,
        "-q",
        "-o",
        "shared",
    ]
    ended = subprocess.run(
        [*command, "train.dataloader_num_workers=1"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    return folder / "shared"


@pytest.mark.usefixtures("warm_python")
@pytest.mark.parametrize("task, method", [("csv", "spawn"), ("chat", "forkserver")])
def test_data_loader_workers_do_not_change_the_run(
    cli: Cli, tmp_path: Path, task: str, method: str
) -> None:
    settings = arguments(tmp_path, task)
    assert cli("train", *settings, "-q", "-o", "alone").code == 0
    runs = (tmp_path / "alone", train_with_workers(tmp_path, method, settings))
    alone, shared = map(record, runs)
    assert shared["metrics"]["train"] == alone["metrics"]["train"]
    assert shared["metrics"]["final"]["values"] == alone["metrics"]["final"]["values"]
    assert shared["hashes"]["order"] == alone["hashes"]["order"]
    expected, found = (load_file(adapter_path(run)) for run in runs)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
