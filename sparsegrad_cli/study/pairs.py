"""Which methods differ: every pair of them, over all seeds and tasks, corrected for their number.

A pair of methods is compared on the (task, seed) cells that both have finished: same data, same
order, same head. Tasks have scores of different kinds and sizes, so each difference is divided by
the root mean square of its task's (which no change of signs changes), and turned so that more is
better. The primary test flips signs: were the two methods alike, which of them got which score in
a cell would be a coin's throw. It is exact at any number of cells and assumes no distribution; what
it says holds for these tasks. Student's t on the plain differences, where the
tasks' scores are of one kind, stands beside it: its interval says how large a difference may be.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from sparsegrad_cli.records.metric_direction import common_metric, scale_of
from sparsegrad_cli.report.access import text
from sparsegrad_cli.study.rows import score_of
from sparsegrad_cli.study.statistics import (
    LEVEL,
    holm,
    mean,
    sign_flip_p,
    smallest_p,
    student,
)

TEST = (
    "sign-flip permutation test over (task, seed) cells, two-sided, differences divided by their "
    "task's root mean square"
)
CHECK = "paired t-test over seeds, tasks as strata, two-sided, corrected alike"
_MIN_SEEDS = 2

Scores = dict[tuple[str, int], float]


def pair_tests(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The ``tests`` block of compare.json.

    A task counts for a pair that shares two seeds of it or more: one seed ranks nothing.
    """
    scores: dict[str, Scores] = {}
    metrics: dict[str, str | None] = {}
    for cell in cells:
        kept = scores.setdefault(cell["method"], {})
        score = score_of(cell)
        if score is not None:
            kept[cell["task"], cell["seed"]] = score
            metrics.setdefault(cell["task"], text(cell, "run", "task", "metric"))
    found = [_pair(a, b, scores[a], scores[b], metrics) for a, b in combinations(scores, 2)]
    pairs = [pair for pair in found if pair is not None]
    for name in ("p", "p_t"):
        there = [pair for pair in pairs if pair[name] is not None]
        adjusted = holm([pair[name] for pair in there])
        for pair, value in zip(there, adjusted, strict=True):
            pair[f"{name}_holm"] = value
    for pair in pairs:
        if pair["p_holm"] <= LEVEL:
            pair["better"] = pair["a"] if pair.pop("_lean") > 0 else pair["b"]
        pair.pop("_lean", None)
    return {
        "test": TEST,
        "check": CHECK,
        "correction": f"Holm's, over {len(pairs)} pairs",
        "level": LEVEL,
        "untested": len(found) - len(pairs),
        "pairs": pairs,
    }


def _pair(
    a: str, b: str, ours: Scores, theirs: Scores, metrics: Mapping[str, str | None]
) -> dict[str, Any] | None:
    """One pair, on the tasks of which they share two seeds or more; None without such a task."""
    seeds: dict[str, list[int]] = {}
    for task, seed in ours:
        if (task, seed) in theirs:
            seeds.setdefault(task, []).append(seed)
    seeds = {task: common for task, common in seeds.items() if len(common) >= _MIN_SEEDS}
    if not seeds:
        return None
    by_task = {t: [ours[t, s] - theirs[t, s] for s in common] for t, common in seeds.items()}
    turned = [
        value
        for task, differences in by_task.items()
        for value in _standardised(differences, scale_of(metrics[task]).lower_is_better)
    ]
    metric = common_metric([metrics[task] for task in by_task])
    means = [mean(differences) or 0.0 for differences in by_task.values()]
    found = student(list(by_task.values())) if metric else None
    return {
        "a": a,
        "b": b,
        "n": len(turned),
        "tasks": len(by_task),
        "seeds": len(set().union(*seeds.values())),
        "metric": metric,
        "wins": sum(value > 0 for value in turned),
        "losses": sum(value < 0 for value in turned),
        "mean": mean(means) if metric else None,
        "interval": [found.low, found.high] if found else None,
        "p": sign_flip_p(turned),
        "p_holm": None,
        "p_t": found.p if found else None,
        "p_t_holm": None,
        "smallest_p": smallest_p(turned),
        "better": None,
        "_lean": math.fsum(turned),
    }


def _standardised(differences: Sequence[float], lower_is_better: bool) -> list[float]:
    """Divided by their root mean square, more is better; zeros where all are zero."""
    size = math.sqrt(math.fsum(d * d for d in differences) / len(differences))
    sign = -1.0 if lower_is_better else 1.0
    return [sign * d / size if size else 0.0 for d in differences]
