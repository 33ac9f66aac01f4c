"""Entries of compare.json made from a few numbers, and the tables computed from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparsegrad_cli.records.base import Block
from sparsegrad_cli.records.study import BudgetBlock, CellEntry
from sparsegrad_cli.study.evidence import evidence, make_checks, with_measured
from sparsegrad_cli.study.pairs import pair_tests
from sparsegrad_cli.study.rows import make_rows

Scores = Mapping[str, Mapping[str, Sequence[float]]]


def cell(
    method: str,
    seed: int,
    score: float,
    *,
    task: str = "t",
    metric: str = "accuracy",
    calibration: Mapping[str, Any] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Return the entry of a finished run; ``changes`` replace its keys."""
    phases = {
        "load": {"peak_bytes": 100, "categories": {"weights": 100}},
        "forward": {
            "peak_bytes": 140,
            "categories": {"weights": 110, "saved_activations": 25, "optimizer_state": 5},
        },
        "backward": {
            "peak_bytes": 150,
            "categories": {"weights": 110, "saved_activations": 15, "optimizer_state": 5},
        },
        "optimizer": {"peak_bytes": 130, "categories": {"weights": 110, "optimizer_state": 8}},
    }
    run = {
        "status": "done",
        "metrics": {"best": {"step": 20, "score": score, "loss": 1 - score}},
        "memory": {"phases": phases},
        "counts": {
            "trainable_targets": 10,
            "trainable": 12,
            "touched_targets": 30 + seed,
            "touched": 32 + seed,
            "remainder": 2,
        },
        "time": {"steps_per_s": 4.0 + seed, "train_s": 30.0, "calibrate_s": 0.0},
        "task": {"metric": metric},
        "model": {"name": "m", "fingerprint": "m"},
        "hashes": {
            "data": "d",
            "head_init": f"h{seed}",
            "precision": "p",
            "order": {"10": "x", "20": method},
        },
        "sizes": {"adapter_bytes": 5},
        "environment": {"python": "3", "packages": {"torch": "2"}, "device": "cpu"},
        "git": {"commit": "c"},
    }
    if calibration is not None:
        run["calibration"] = dict(calibration)
        run["time"] = {**run["time"], "calibrate_s": calibration["seconds"]}  # type: ignore[dict-item]
    made = {"task": task, "method": method, "seed": seed, "status": "done", "error": None}
    return {**made, "run": run, "run_dir": f"cells/{task}-{method}-{seed}", **changes}


def study_cells(scores: Scores, metrics: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Return entries for ``{task: {method: [score of seed 0, score of seed 1, ...]}}``."""
    metrics = metrics or {}
    return [
        cell(method, seed, score, task=task, metric=metrics.get(task, "accuracy"))
        for task, methods in scores.items()
        for method, values in methods.items()
        for seed, score in enumerate(values)
    ]


def entries(cells: Sequence[Mapping[str, Any]]) -> list[CellEntry]:
    """Return entries as typed records."""
    return [CellEntry.model_validate(cell) for cell in cells]


def rows_of(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of some entries, as JSON."""
    return _plain(make_rows(entries(cells)))


def pair_tests_of(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the tests of all pairs of methods, as JSON."""
    return pair_tests(entries(cells)).to_json()


def checks_of(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the checks of some entries, as JSON."""
    return _plain(make_checks(entries(cells)))


def evidence_of(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return rows, tests and checks, as JSON."""
    found = evidence(entries(cells))
    return {
        "rows": _plain(found["rows"]),
        "tests": found["tests"].to_json(),
        "checks": _plain(found["checks"]),
    }


def measured_in(budget: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a budget with the measurements of some entries, as JSON."""
    return with_measured(BudgetBlock.model_validate(budget), entries(cells)).to_json()


def _plain(blocks: Sequence[Block]) -> list[dict[str, Any]]:
    return [block.to_json() for block in blocks]
