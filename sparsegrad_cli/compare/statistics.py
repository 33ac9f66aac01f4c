"""From cells to rows: mean, spread, paired differences; and whether the comparison was fair."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

TRAIN_STEP = ("forward", "backward", "optimizer")


def mean(values: Sequence[float]) -> float | None:
    """Arithmetic mean, or None of nothing."""
    return math.fsum(values) / len(values) if values else None


def std(values: Sequence[float]) -> float | None:
    """Sample standard deviation (n - 1), or None below two values."""
    if len(values) < 2:
        return None
    centre = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - centre) ** 2 for v in values) / (len(values) - 1))


def paired_difference(
    ours: Mapping[int, float], theirs: Mapping[int, float], against: str
) -> dict[str, Any] | None:
    """Paired t-test over the seeds that both have.

    Returns:
        mean difference, p (two-sided; None below two pairs or when all differences are equal),
        and n; None without a common seed.
    """
    seeds = sorted(set(ours) & set(theirs))
    if not seeds:
        return None
    differences = [ours[s] - theirs[s] for s in seeds]
    p = None
    if len(seeds) >= 2 and max(differences) - min(differences) > 0:
        from scipy import stats

        p = float(stats.ttest_rel([ours[s] for s in seeds], [theirs[s] for s in seeds]).pvalue)
    return {
        "against": against,
        "mean": mean(differences),
        "p": p,
        "test": "paired t-test over seeds, two-sided",
        "n": len(seeds),
    }


def make_rows(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a task and method, in the order of the cells."""
    keys = list(dict.fromkeys((cell["task"], cell["method"]) for cell in cells))
    rows = [
        _row(task, m, [c for c in cells if (c["task"], c["method"]) == (task, m)])
        for task, m in keys
    ]
    for task in dict.fromkeys(task for task, _ in keys):
        here = [row for row in rows if row["task"] == task]
        reference = next((r for r in here if r["method"] == "lora"), here[0])
        for row in here:
            row["difference"] = None
            if row is not reference:
                row["difference"] = paired_difference(
                    row["_by_seed"], reference["_by_seed"], reference["method"]
                )
    for row in rows:
        del row["_by_seed"]
    return rows


def _row(task: str, method: str, cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    done = [c for c in cells if c["status"] == "done" and c["run"]]
    runs = [c["run"] for c in done]
    by_seed = {c["seed"]: float(c["run"]["metrics"]["best"]["score"]) for c in done}
    scores = list(by_seed.values())
    first: Mapping[str, Any] = runs[0] if runs else {}
    peaks = [peak for peak in map(train_step_peak, runs) if peak]
    worst = max(peaks, key=lambda phase: phase["peak_bytes"], default=None)
    weights = _get(first, "memory", "phases", "load", "categories", "weights") or 0
    return {
        "task": task,
        "method": method,
        "seeds_done": len(done),
        "seeds_asked": len(cells),
        "status": _row_status(cells),
        "metric": _get(first, "task", "metric"),
        "score_mean": mean(scores),
        "score_std": std(scores),
        "scores": scores,
        "validation_loss_mean": mean([float(r["metrics"]["best"]["loss"]) for r in runs]),
        "trainable_targets": _get(first, "counts", "trainable_targets"),
        "trainable": _get(first, "counts", "trainable"),
        "peak_bytes": worst["peak_bytes"] if worst else None,
        "memory_categories": worst["categories"] if worst else None,
        "beyond_weights_bytes": worst["peak_bytes"] - weights if worst else None,
        "steps_per_s": mean([float(r["time"]["steps_per_s"]) for r in runs]),
        "steps_per_s_iqr": _spread([float(r["time"]["steps_per_s"]) for r in runs]),
        "calibrate_s": mean([float(r["time"].get("calibrate_s") or 0.0) for r in runs]),
        "calibrate_peak_bytes": _get(first, "calibration", "peak_bytes") or 0,
        "adapter_bytes": _get(first, "sizes", "adapter_bytes"),
        "note": _note(cells, first),
        "_by_seed": by_seed,
    }


def train_step_peak(run: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The phase of the training step with the highest peak."""
    phases = _get(run, "memory", "phases") or {}
    there = [phases[name] for name in TRAIN_STEP if phases.get(name)]
    return max(there, key=lambda phase: phase["peak_bytes"], default=None)


def _row_status(cells: Sequence[Mapping[str, Any]]) -> str:
    statuses = [cell["status"] for cell in cells]
    if all(status == "done" for status in statuses):
        return "done"
    for status in ("out_of_memory", "failed", "interrupted"):
        if status in statuses:
            return status
    return "pending"


def _note(cells: Sequence[Mapping[str, Any]], first: Mapping[str, Any]) -> str:
    reasons = [c["error"]["what"].splitlines()[0] for c in cells if c.get("error")]
    if reasons:
        return reasons[0]
    remainder = _get(first, "counts", "remainder")
    parts = [str(_get(first, "counts", "note") or "")]
    if remainder:
        parts.append(f"{remainder:+,} entries against the number asked for")
    return "; ".join(part for part in parts if part)


def _spread(values: Sequence[float]) -> float | None:
    return max(values) - min(values) if len(values) > 1 else None


def make_checks(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per task and seed: did all methods start from one head and meet one order of one data set?"""
    checks = []
    for task, seed in dict.fromkeys((cell["task"], cell["seed"]) for cell in cells):
        runs = [
            c["run"]
            for c in cells
            if (c["task"], c["seed"]) == (task, seed) and c["status"] == "done" and c["run"]
        ]
        hashes = [run["hashes"] for run in runs]
        common = set.intersection(*(set(h["order"]) for h in hashes)) if hashes else set()
        last = max(common, key=int, default=None)
        checks.append(
            {
                "task": task,
                "seed": seed,
                "methods": len(runs),
                "same_data": _same([h["data"] for h in hashes]),
                "same_head_init": _same([h["head_init"] for h in hashes]),
                "same_order": _same([h["order"][last] for h in hashes]) if last else None,
                "steps_compared": int(last) if last else 0,
            }
        )
    return checks


def _same(values: Sequence[str]) -> bool | None:
    """None where there is nothing to compare."""
    return len(set(values)) == 1 if len(values) > 1 else None


def _get(data: Any, *keys: str) -> Any:
    for key in keys:
        data = data.get(key) if isinstance(data, Mapping) else None
    return data
