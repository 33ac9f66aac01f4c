"""Was it fair? What the cells of a task and seed must have had in common, by their hashes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sparsegrad_cli.report.access import block, step_number, text

Cell = Mapping[str, Any]
# key of a check -> where a run says it
SAME = {
    "same_data": ("hashes", "data"),
    "same_head_init": ("hashes", "head_init"),
    "same_model": ("model", "fingerprint"),
    "same_precision": ("hashes", "precision"),
}


def make_checks(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Per task and seed: did all methods have one model, head, data set, order and precision?

    True, False, or None where fewer than two runs say it. The order is compared at the last step
    that all have in common: of batches, or of their rows where some run cut its batches up.
    """
    return [
        _check(task, seed, [c for c in cells if (c["task"], c["seed"]) == (task, seed)])
        for task, seed in dict.fromkeys((cell["task"], cell["seed"]) for cell in cells)
    ]


def _check(task: str, seed: int, cells: Sequence[Cell]) -> dict[str, Any]:
    runs = [run for c in cells if c["status"] == "done" and (run := block(c, "run"))]
    same_order, last = _order(runs)
    return {
        "task": task,
        "seed": seed,
        "methods": len(runs),
        **{key: _same([text(run, *where) for run in runs]) for key, where in SAME.items()},
        "same_order": same_order,
        "steps_compared": last,
        "same_code": _same([_code(run) for run in runs]),
    }


def _order(runs: Sequence[Mapping[str, Any]]) -> tuple[bool | None, int]:
    """Whether all met the same in the same order, and up to which step."""
    same, steps = _chain(runs, "order")
    rows = _chain(runs, "rows") if same is False else (None, 0)
    return (same, steps) if rows[0] is None else rows


def _chain(runs: Sequence[Mapping[str, Any]], name: str) -> tuple[bool | None, int]:
    orders = [block(run, "hashes", name) for run in runs]
    common = set.intersection(*(set(order) for order in orders)) if orders else set()
    last = max(filter(None, map(step_number, common)), default=None)
    if last is None:
        return None, 0
    return _same([text(order, str(last)) for order in orders]), last


def _same(values: Sequence[str | None]) -> bool | None:
    """None where there is nothing to compare, or where it was not recorded."""
    known = [value for value in values if value is not None]
    if len(set(known)) > 1:
        return False
    return True if len(known) > 1 and len(known) == len(values) else None


def _code(run: Mapping[str, Any]) -> str | None:
    """Commit, versions and machine: two runs of one comparison may lie days apart."""
    environment = block(run, "environment")
    if not environment:
        return None
    said = {key: environment.get(key) for key in ("python", "packages", "device", "device_name")}
    return json.dumps([said, text(run, "git", "commit")], sort_keys=True, default=str)
