"""The first two tutorials work: their commands, in order, write the files that the pages name.

Runs are shortened by overrides, and a tiny model takes the place of the pretrained one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from support.pages import blocks, commands
from support.paths import REPO

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("warm_python")]
PAGES = REPO / "docs" / "tutorials"
FEW = (
    "task.train_limit=16",
    "task.eval_limit=8",
    "train.per_device_train_batch_size=8",
    "calibration.steps=2",
    "calibration.warmup_steps=0",
    "calibration.energy_steps=1",
)
WORDS = {1: ("fine", "warm", "funny", "moving"), 0: ("dull", "cold", "endless", "clumsy")}


def run(folder: Path, *command: str) -> str:
    """Run a program in a folder; return what it printed."""
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    ended = subprocess.run(
        command, cwd=folder, env=environment, input="", capture_output=True, text=True
    )
    assert ended.returncode == 0, f"{command}\n{ended.stdout}{ended.stderr}"
    return ended.stdout


def follow(page: str, folder: Path, more: Mapping[str, tuple[str, ...]]) -> str:
    """Run the commands of a page, and the Python code that needs no network.

    ``more`` is appended to the commands of a name.
    """
    printed = ""
    for language, block in blocks(PAGES / page):
        if language == "python" and "load_dataset" not in block:
            printed += run(folder, sys.executable, "-c", block)
        elif language == "bash":
            for name, *arguments in commands(block):
                line = ("-m", "sparsegrad_cli", name, *arguments, *more.get(name, ()))
                printed += run(folder, sys.executable, *line)
    return printed


def check_files(page: str, folder: Path, *names: str) -> None:
    """Check that a page names files, whole or by their last part, and that they are there."""
    text = (PAGES / page).read_text(encoding="utf-8")
    for name in names:
        assert name in text or Path(name).name in text, f"{page} does not name {name}"
        assert (folder / name).exists(), name


def write_reviews(path: Path, repeats: int, *, label: bool = True) -> None:
    rows = [
        f"film {number} is {word} from its start to its end{f',{value}' * label}"
        for number in range(repeats)
        for value, words in WORDS.items()
        for word in words
    ]
    path.write_text("\n".join([f"sentence{',label' * label}", *rows]) + "\n")


def test_first_run(tmp_path: Path, small_bert: str) -> None:
    few = (*FEW, f"model={small_bert}")
    follow("first-run.md", tmp_path, dict.fromkeys(("calibrate", "train", "compare"), few))
    calibrated = ("runs/basis/basis.safetensors", "runs/basis/report.html")
    trained = [f"runs/first/{name}" for name in ("recipe.yaml", "run.json", "adapter")]
    check_files("first-run.md", tmp_path, *calibrated, *trained, "runs/first/report.html")


def test_your_own_classifier(tmp_path: Path, small_bert: str) -> None:
    write_reviews(tmp_path / "reviews.csv", 8)
    write_reviews(tmp_path / "new.csv", 2, label=False)
    write_reviews(tmp_path / "test.csv", 2)
    few = (*FEW, f"model={small_bert}")
    printed = follow("your-own-classifier.md", tmp_path, {"train": few, "compare": few})
    assert "wrote reviews.yaml. Next:" in printed and "'label': " in printed
    made = ("reviews.yaml", "runs/reviews", "labelled.csv", "runs/reviews/export-merged")
    check_files("your-own-classifier.md", tmp_path, *made, "reports/test")
    assert "prediction,probability" in (tmp_path / "labelled.csv").read_text()
