"""Write the figures of README.md from the records in docs/results."""

from __future__ import annotations

import json
import re
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
README = _ROOT / "README.md"
_LABELS = {
    "lora": "LoRA, rank 3",
    "core": "SparseGrad (default)",
    "core-dense": "SparseGrad, `support: dense`",
    "meprop": "MeProp",
    "full": "full fine-tuning",
}
_TASKS = ("sst2", "rte", "cola")
_MARKERS = re.compile(r"(?<=<!-- results -->\n).*?(?=<!-- end of results -->)", re.DOTALL)
_CPU_TIME = re.compile(r"(?<=<!-- cpu time -->).*?(?=<!-- -->)")


def mean_scores() -> dict[str, dict[str, tuple[float, float]]]:
    """Return mean and standard deviation over seeds, times 100, by method and task."""
    rows = json.loads((_ROOT / "docs/results/core_glue.json").read_text())["rows"]
    scores: dict[str, dict[str, tuple[float, float]]] = {}
    for row in rows:
        task = row["task"].removeprefix("glue/")
        scores.setdefault(row["method"], {})[task] = (
            100 * row["score_mean"],
            100 * row["score_std"],
        )
    return scores


def peak_memory() -> dict[str, float]:
    """Return the peak of a training step on sst2 beyond the weights, in MiB, by method."""
    rows = json.loads((_ROOT / "docs/results/core_glue_memory.json").read_text())["rows"]
    return {
        row["label"]: row["beyond_weights_bytes"] / 2**20
        for row in rows
        if row["task"] == "glue/sst2"
    }


def cpu_time() -> float:
    """Return the CPU time of a whole LoRA run, as a share of that of Trainer with PEFT."""
    record = json.loads((_ROOT / "docs/results/whole_job_cola.json").read_text())
    ratio: float = record["cpu_seconds"]["sparsegrad, LoRA"]["ratio"]
    return ratio


def page() -> str:
    """Return README.md with its figures written again."""
    scores, memory = mean_scores(), peak_memory()
    head = ["method", *_TASKS, "mean", "peak memory, MiB"]
    rows = [_row(head), _row([":--", *["--:"] * 5])]
    for name, label in _LABELS.items():
        each = [f"{mean:.1f} ± {std:.1f}" for mean, std in (scores[name][t] for t in _TASKS)]
        mean = sum(scores[name][task][0] for task in _TASKS) / len(_TASKS)
        rows.append(_row([label, *each, f"{mean:.1f}", f"{memory[name]:.0f}"]))
    table = "\n".join(rows) + "\n"
    text = _MARKERS.sub(lambda _: table, README.read_text(encoding="utf-8"))
    return _CPU_TIME.sub(f"{100 * cpu_time():.0f} %", text)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
