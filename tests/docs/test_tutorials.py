"""The tutorials work: their commands, run in order in an empty folder, write what the pages say.

Runs are shortened by settings after the commands, and tiny models replace the pretrained ones.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from support.chat_models import chat_model_folder
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


def run(folder: Path, *command: str, typed: str = "") -> str:
    """Run a program in a folder, with ``typed`` as its standard input; return what it printed."""
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    ended = subprocess.run(
        command, cwd=folder, env=environment, input=typed, capture_output=True, text=True
    )
    assert ended.returncode == 0, f"{command}\n{ended.stdout}{ended.stderr}"
    return ended.stdout


def follow(page: str, folder: Path, more: Mapping[str, tuple[str, ...]], typed: str = "") -> str:
    """Run the commands of a page, and the Python code that needs no network.

    ``more`` is appended to the commands of a name, unless they start nothing, and all of them may
    read ``typed``. A block of YAML replaces lines of the file that ``configs copy`` wrote before.
    """
    printed, copied = "", Path()
    for language, block in blocks(PAGES / page):
        if language == "yaml":
            (folder / copied).write_text(with_lines((folder / copied).read_text(), block))
        elif language == "python" and "load_dataset" not in block:
            printed += run(folder, sys.executable, "-c", block)
        elif language == "bash":
            for name, *arguments in commands(block):
                few = () if "--dry-run" in arguments else more.get(name, ())
                line = ("-m", "sparsegrad_cli", name, *arguments, *few)
                printed += run(folder, sys.executable, *line, typed=typed)
                if name == "configs":
                    copied = Path(arguments[-1])
    return printed


def with_lines(text: str, lines: str) -> str:
    """Replace the line of each key."""
    for line in lines.splitlines():
        key = line.partition(":")[0]
        text, count = re.subn(rf"^{key}:.*$", line, text, flags=re.MULTILINE)
        assert count == 1, key
    return text


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


def write_conversations(page: str, path: Path, count: int) -> None:
    """Write the conversation that a page shows, with another question in every line."""
    (shown,) = (block for language, block in blocks(PAGES / page) if language == "json")
    rows = [json.loads(shown) for _ in range(count)]
    for number, row in enumerate(rows):
        row["messages"][0]["content"] = row["messages"][0]["content"].replace("7", str(number))
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def test_chat_model(tmp_path: Path) -> None:
    base = chat_model_folder(tmp_path / "base", num_hidden_layers=4)
    write_conversations("chat-model.md", tmp_path / "conversations.jsonl", 20)
    more = {
        "train": (*FEW, f"model={base}"),
        "generate": ("--max-new-tokens", "4"),
        "estimate": (f"model={base}",),
    }
    printed = follow("chat-model.md", tmp_path, more, typed="Is 7 prime?\n/exit\n")
    assert "wrote conversations.yaml. Next:" in printed
    made = ("runs/chat", "conversations.jsonl", "conversations.yaml")
    check_files("chat-model.md", tmp_path, *made)
    assert (tmp_path / "runs/chat/export-lora/adapter_config.json").exists()


def test_reproduce_a_table(tmp_path: Path, small_bert: str) -> None:
    (tmp_path / "glue" / "RTE").mkdir(parents=True)
    for name, count in (("train", 16), ("dev", 8)):
        rows = [f"{n}\ta {n}\tb {n}\t{'not_' * (n % 2)}entailment" for n in range(count)]
        text = "\n".join(["index\tsentence1\tsentence2\tlabel", *rows])
        (tmp_path / "glue" / "RTE" / f"{name}.tsv").write_text(f"{text}\n")
    few = (*FEW, f"model={small_bert}", "task.path=glue", "train.num_train_epochs=1")
    printed = follow("reproduce-a-table.md", tmp_path, {"compare": few})
    assert "paper_table_5_roberta: 96 runs" in printed
    check_files("reproduce-a-table.md", tmp_path, "rte.yaml", "runs/compare-rte/report.html")
    runs = (tmp_path / "runs" / "compare-rte").rglob("run.json")
    assert sum(json.loads(file.read_text())["status"] == "done" for file in runs) == 12
