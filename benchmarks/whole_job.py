"""A whole fine-tuning job beside the same job by a plain Trainer + PEFT script.

Each side is a process of its own: start, data, calibration, training, evaluation after every epoch.
They take turns, and the ratios are of CPU seconds within a round. Both see the same rows for the
same number of steps; each shuffles with its own generator.

python -m benchmarks.whole_job --task cola --data FOLDER --out docs/results/whole_job_cola.json

FOLDER holds GLUE's files as the benchmark publishes them (CoLA/train.tsv, ...). Without it, the
built-in acceptability task is used, and nothing is downloaded.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import ratios, save

# Columns of GLUE's files: whether there is a header, then texts and label.
FILES = {
    "cola": ("CoLA", False, (3,), 1),
    "sst2": ("SST-2", True, (0,), 1),
    "rte": ("RTE", True, (1, 2), 3),
}
PLAIN = "Trainer + PEFT, LoRA"
OURS = {
    "sparsegrad, LoRA": ("method={name: lora, rank: 3}", "train.learning_rate=2e-3"),
    "sparsegrad, core": (
        "method={name: sparsegrad, support: static, density: 0.01}",
        "train.learning_rate=1e-3",
    ),
}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=[*FILES, "acceptability"], default="acceptability")
    parser.add_argument("--data", type=Path, help="folder of GLUE's files")
    parser.add_argument("--model", default="builtin:minilm")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--rows", type=int, help="of the training set; all by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        data.mkdir()
        rows = write_rows(data, args.task, args.data, args.rows)
        sides = commands(Path(folder), data, args)
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        for number in range(args.rounds):
            for name, command in sides.items():
                runs[name].append(
                    measured([word.replace("{number}", str(number)) for word in command])
                )
                print(number, name, runs[name][-1], file=sys.stderr, flush=True)
        records = {name: record_of(Path(folder), name) for name in OURS}
    seconds = {name: [run["cpu_s"] for run in each] for name, each in runs.items()}
    content = {
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        | {"data": None, "out": None},
        "rows": rows,
        "cpu_seconds": ratios(seconds, PLAIN),
        "runs": runs,
        "records": records,
    }
    save(args.out, "whole_job", content)


def write_rows(folder: Path, task: str, source: Path | None, limit: int | None) -> dict[str, int]:
    """Write train.csv and validation.csv, which both sides read; return their rows."""
    counts = {}
    for split, name in (("train", "train"), ("validation", "dev")):
        rows = glue_rows(source, task, name) if source else builtin_rows(split)
        rows = rows[:limit] if split == "train" else rows
        with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            texts = ["text", "text_pair"][: len(rows[0]) - 1]
            writer.writerows([[*texts, "label"], *rows])
        counts[split] = len(rows)
    return counts


def glue_rows(source: Path, task: str, split: str) -> list[list[str]]:
    """Read one of GLUE's files; labels become numbers in the order of their names."""
    name, header, texts, label = FILES[task]
    lines = (source / name / f"{split}.tsv").read_text(encoding="utf-8").splitlines()
    cells = [line.split("\t") for line in lines[1 if header else 0 :]]
    names = sorted({row[label] for row in cells})
    return [[*(row[n] for n in texts), str(names.index(row[label]))] for row in cells]


def builtin_rows(split: str) -> list[list[str]]:
    """Return the rows of the built-in task."""
    from sparsegrad_cli.data.load_task import load_task
    from sparsegrad_cli.recipe.task_section import TaskSection

    task = load_task(TaskSection(name="builtin:acceptability"))
    data = task.train if split == "train" else next(iter(task.validation.values()))
    return [[row["text"], str(row["label"])] for row in data]


def commands(folder: Path, data: Path, args: argparse.Namespace) -> dict[str, Sequence[str]]:
    """Return the command of each side; ``{number}`` in it is the number of the round."""
    from sparsegrad_cli.models.pretrained import locate

    script = Path(__file__).parent / "plain" / "trainer_lora.py"
    plain = [sys.executable, str(script), str(locate(args.model)), str(data)]
    plain += [str(folder / "plain-{number}"), "--epochs", str(args.epochs)]
    sides: dict[str, Sequence[str]] = {PLAIN: [*plain, *(["--bf16"] if args.bf16 else [])]}
    pair = ["task.columns.text_pair=text_pair"] if args.task == "rte" else []
    for name, settings in OURS.items():
        sides[name] = [
            *(sys.executable, "-m", "sparsegrad_cli", "train", "quickstart"),
            *(f"model={args.model}", "task.name=csv", f"task.path={data}", "task.max_length=128"),
            *("task.columns.text=text", "task.columns.label=label", *pair),
            *("train.train_sampling_strategy=random", f"train.num_train_epochs={args.epochs}"),
            *("train.eval_strategy=epoch", "train.save_strategy=no"),
            *("train.load_best_model_at_end=false", "train.use_cpu=true"),
            *(settings if not args.bf16 else (*settings, "train.bf16=true")),
            *("-o", str(folder / f"{slug(name)}-{{number}}")),
        ]
    return sides


def slug(name: str) -> str:
    """Return a name for a folder."""
    return name.replace(", ", "-")


def measured(command: Sequence[str]) -> dict[str, float]:
    """Run a command; return its CPU seconds, wall seconds and largest resident memory.

    Raises:
        SystemExit: it failed.
    """
    started = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            raise SystemExit(output.read().decode(errors="replace"))
    return {
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "wall_s": time.perf_counter() - started,
        "rss_bytes": usage.ru_maxrss * 1024,
    }


def record_of(folder: Path, name: str) -> dict[str, Any]:
    """Return what the first run of a side recorded: score, times, tokens and peaks."""
    from sparsegrad_cli.records.store import load_run

    run = load_run(folder / f"{slug(name)}-0")
    assert run.metrics and run.time and run.tokens and run.memory
    return {
        "final": run.metrics.final.to_json() if run.metrics.final else None,
        "time": run.time.to_json(),
        "tokens": run.tokens.to_json(),
        "peaks": {name: phase.peak_bytes for name, phase in run.memory.phases.items()},
    }


if __name__ == "__main__":
    main()
