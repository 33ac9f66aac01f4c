"""From cells to rows: one a task and method, with what it scored and what it took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparsegrad_cli.methods.registry import BASELINE
from sparsegrad_cli.report.access import dig, number, text
from sparsegrad_cli.study.costs import costs_of
from sparsegrad_cli.study.statistics import mean, std, student

Cell = Mapping[str, Any]


def score_of(cell: Cell) -> float | None:
    """The score of a cell that is done: its best evaluation's."""
    if cell.get("status") != "done":
        return None
    return number(cell, "run", "metrics", "best", "score")


def make_rows(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """One row a task and method, in the order of the cells."""
    keys = list(dict.fromkeys((cell["task"], cell["method"]) for cell in cells))
    uses = basis_uses(cells)
    rows = [
        _row(task, m, [c for c in cells if (c["task"], c["method"]) == (task, m)], uses)
        for task, m in keys
    ]
    for task in dict.fromkeys(task for task, _ in keys):
        here = [row for row in rows if row["task"] == task]
        reference = next((r for r in here if r["method"] == BASELINE), here[0])
        for row in here:
            row["difference"] = None
            if row is not reference:
                row["difference"] = paired_difference(
                    row["_by_seed"], reference["_by_seed"], reference["method"]
                )
    for row in rows:
        del row["_by_seed"]
    return rows


def paired_difference(
    ours: Mapping[int, float], theirs: Mapping[int, float], against: str
) -> dict[str, Any] | None:
    """Mean difference over the seeds that both have, with its 95 % interval.

    No p: one task's few seeds are no test, and many tasks' would have to be corrected. The tests
    are those of :mod:`sparsegrad_cli.study.pairs`.

    Returns:
        ``against``, ``mean``, ``interval`` (None below two seeds), ``n``; None without a common
        seed.
    """
    differences = [ours[seed] - theirs[seed] for seed in sorted(set(ours) & set(theirs))]
    if not differences:
        return None
    found = student([differences])
    return {
        "against": against,
        "mean": mean(differences),
        "interval": [found.low, found.high] if found else None,
        "n": len(differences),
    }


def basis_uses(cells: Sequence[Cell]) -> dict[str, int]:
    """Digest of a basis to the number of finished cells that trained in it."""
    uses: dict[str, int] = {}
    for cell in cells:
        digest = text(cell, "run", "calibration", "digest")
        if digest and cell["status"] == "done":
            uses[digest] = uses.get(digest, 0) + 1
    return uses


def _row(task: str, method: str, cells: Sequence[Cell], uses: Mapping[str, int]) -> dict[str, Any]:
    done = [c for c in cells if score_of(c) is not None]
    runs = [c["run"] for c in done]
    by_seed = {c["seed"]: score_of(c) or 0.0 for c in done}
    scores = list(by_seed.values())
    first: Mapping[str, Any] = runs[0] if runs else {}
    found = student([scores])
    return {
        "task": task,
        "method": method,
        "seeds_done": len(done),
        "seeds_asked": len(cells),
        "status": _status(cells),
        "metric": text(first, "task", "metric"),
        "positive_label": text(first, "task", "positive_label"),
        "score_mean": mean(scores),
        "score_std": std(scores),
        "score_interval": [found.low, found.high] if found else None,
        "scores": scores,
        "validation_loss_mean": _mean(runs, "metrics", "best", "loss"),
        **costs_of(runs, uses),
        "note": _note(cells, first),
        "_by_seed": by_seed,
    }


def _mean(runs: Sequence[Any], *keys: str) -> float | None:
    return mean([v for v in (number(run, *keys) for run in runs) if v is not None])


def _status(cells: Sequence[Cell]) -> str:
    statuses = [cell["status"] for cell in cells]
    if all(status == "done" for status in statuses):
        return "done"
    for status in ("out_of_memory", "failed", "interrupted"):
        if status in statuses:
            return status
    return "pending"


def _note(cells: Sequence[Cell], first: Mapping[str, Any]) -> str:
    for cell in cells:
        what = dig(cell, "error", "what")
        if isinstance(what, str) and what.strip():
            return what.strip().splitlines()[0]
    remainder = number(first, "counts", "remainder")
    parts = [text(first, "counts", "note") or ""]
    if remainder:
        parts.append(f"{remainder:+,.0f} entries against the number asked for")
    return "; ".join(part for part in parts if part)
