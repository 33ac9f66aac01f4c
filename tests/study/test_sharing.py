"""Two comparisons in one folder, as two people would start them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from paths import REPO

TINY = (
    "task.train_limit=16",
    "task.eval_limit=8",
    "task.max_length=16",
    "train.per_device_train_batch_size=8",
    "train.max_steps=2",
    "train.logging_steps=1",
)


def compare(folder: Path, methods: str, *more: str) -> subprocess.Popen[str]:
    command = ("compare", "--methods", methods, "--seeds", "1", "-o", str(folder), *TINY, *more)
    return subprocess.Popen(
        [sys.executable, "-m", "sparsegrad_cli", *command],
        env=os.environ | {"PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def begun(told: str) -> Counter[str]:
    """How often each cell was begun, by the lines told before."""
    return Counter(re.findall(r"^\[(\d)/\d\] \S+  \S+  seed \d+$", told, re.MULTILINE))


def test_two_comparisons_share_their_cells(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    both = [compare(folder, "lora,full") for _ in range(2)]
    told = [process.communicate(timeout=900)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert begun("\n".join(told)) == {"1": 1, "2": 1}
    record = json.loads((folder / "compare.json").read_text())
    assert record["status"] == "done" and record["finished"]
    assert [cell["status"] for cell in record["cells"]] == ["done", "done"]
    starts = [cell["run"]["started"] for cell in record["cells"]]
    assert min(starts) >= record["started"]  # of the first of the two
    assert 'http-equiv="refresh"' not in (folder / "report.html").read_text()
    assert not list(folder.glob("cells/*.claim"))


@pytest.mark.slow
def test_killed_comparisons_leave_all_to_the_others(tmp_path: Path) -> None:
    """The cell of the killed one ends by itself, and is not begun again."""
    folder = tmp_path / "c"
    first = compare(folder, "lora,full,meprop")
    deadline = time.monotonic() + 600
    while not list(folder.glob("cells/*/run.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    second = compare(folder, "lora,full,meprop")
    refused = compare(folder, "lora,full,meprop", "--overwrite")
    first.send_signal(signal.SIGKILL)
    told = first.communicate()[1]
    assert "nothing can be overwritten" in " ".join(refused.communicate(timeout=900)[1].split())
    assert refused.returncode == 2
    more = second.communicate(timeout=900)[1]
    assert second.returncode == 0, more
    assert begun(told) == {"1": 1}
    assert begun(told + more) == {"1": 1, "2": 1, "3": 1}
    record = json.loads((folder / "compare.json").read_text())
    assert record["status"] == "done"
    assert [row["status"] for row in record["rows"]] == ["done"] * 3
