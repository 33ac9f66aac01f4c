"""Sample records for reports, made from the examples in docs/reference."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

from sparsegrad_cli.io.atomic import without_nan
from sparsegrad_cli.records.run import RunRecord
from sparsegrad_cli.records.study import StudyRecord
from support.paths import REPO
from support.study_cells import evidence_of


def run_of(record: dict[str, Any]) -> RunRecord:
    """Return a run record as read from a file."""
    return RunRecord.model_validate(without_nan({"schema": 1, "status": "done", **record}))


def study_of(record: dict[str, Any]) -> StudyRecord:
    """Return a study record as read from a file, without runs unless given."""
    whole = {"schema": 1, "status": "done", "cells": [], **record}
    return StudyRecord.model_validate(without_nan(whole))


def documented(number: int) -> dict[str, Any]:
    """Return the documented example of a run (0) or a comparison (1)."""
    name = ("run", "compare")[number]
    page = (REPO / "docs" / "reference" / f"{name}.example.json").read_text(encoding="utf-8")
    record: dict[str, Any] = json.loads(page)
    return record


def run_record() -> dict[str, Any]:
    """Return a finished, calibrated SparseGrad run on the built-in task."""
    record = documented(0)
    steps = range(100, 400, 100)
    record["metrics"]["history"] = [
        {"step": step, "epoch": step / 125, "score": step / 500, "loss": 1 / step, "values": {}}
        for step in steps
    ]
    record["metrics"]["initial"] = {"step": 0, "epoch": 0.0, "score": 0.0, "loss": 0.7}
    record["metrics"]["final"] = record["metrics"]["history"][-1]
    mib = 1024 * 1024
    for number, phase in enumerate(record["memory"]["phases"]):
        record["memory"]["phases"][phase] = {
            "peak_bytes": (90 + 10 * number) * mib,
            "categories": {
                "weights": 86 * mib,
                "bases": 114 * mib,
                "gradients": (4 + 10 * number) * mib,
                "optimizer_state": 81 * mib,
                "saved_activations": 1089 * mib,
                "other": 3 * mib,
            },
            "rss_bytes": 900 * mib,
            "reserved_bytes": None,
        }
    maps = {"original": [[0.3, 0.2], [0.1, 0.4]], "basis": [[1.0, 0.1], [0.0, 0.01]]}
    record["calibration"]["heat_map"].update(maps)
    return record


def compare_record() -> dict[str, Any]:
    """Return a comparison of two methods and two seeds; one LoRA run ran out of memory."""
    record = documented(1)
    record["methods"] = ["lora", "sparsegrad"]
    row = record["rows"][0] | {"peak_bytes": 300 * 1024**2, "beyond_weights_bytes": 200 * 1024**2}
    record["rows"] = [
        row
        | {"method": "lora", "seeds_done": 1, "score_std": None, "difference": None}
        | {"scores": [0.6], "note": "rank 3; 1 of 2 seeds done"},
        row | {"method": "sparsegrad", "score_mean": 0.655, "score_std": 0.012},
    ]
    cell = record["cells"][0]
    record["cells"] = [
        cell | {"method": method, "seed": seed, "run": run_record()}
        for method in record["methods"]
        for seed in record["seeds"]
    ]
    error = {"title": "Out of memory", "what": "the device has 8 GiB", "where": None, "fix": "less"}
    record["cells"][1] |= {"status": "out_of_memory", "error": error, "run": None}
    figure = {"source": "paper", "task": record["tasks"][0], "method": "lora"}
    record["figures"] = [figure | {"score": 0.612, "std": 0.01}]
    return record


def study_record() -> dict[str, Any]:
    """Return a comparison of three methods on two tasks and eight seeds.

    One method is better than the others, one calibrates, and one setting differs by permission.
    """
    record = documented(1)
    tasks, methods, seeds = ("glue/rte", "glue/cola"), ("lora", "core-1e-3", "full"), range(8)
    better = {"lora": 0.0, "core-1e-3": 0.004, "full": 0.05}
    cells = []
    for task in tasks:
        for seed in seeds:
            for method in methods:
                run = run_record() | {"status": "done", "seed": seed}
                wobble = ((7 * seed + 3 * len(method) + len(task)) % 11 - 5) / 400
                score = 0.6 + better[method] + wobble
                run["metrics"]["best"] |= {"score": score, "loss": 1 - score}
                run["hashes"] |= {"head_init": f"head {seed}", "order": {"100": f"{task} {seed}"}}
                run["calibration"]["digest"] = f"{task} {seed}"
                run["method"] |= {"name": method.split("-")[0], "form": None, "support": None}
                if method != "core-1e-3":
                    run |= {"calibration": None, "sparsity": None}
                    run["time"]["calibrate_s"] = 0.0
                about = {"task": task, "method": method, "seed": seed, "status": "done"}
                cells.append(about | {"error": None, "run_dir": "cells/x", "run": run})
    weights = {method: 0.01 * (method == "full") for method in methods}
    rates = {"lora": 2e-3, "core-1e-3": 1e-3, "full": 1e-4}
    record |= {"name": "study", "cells": cells, "figures": []}
    record |= {"tasks": list(tasks), "methods": list(methods), "seeds": list(seeds)}
    record["parity"] = {
        "compared": 48,
        "declared": [{"task": t, "key": "train.learning_rate", "values": rates} for t in tasks],
        "flagged": [{"task": tasks[0], "key": "train.weight_decay", "values": weights}],
    }
    return record | evidence_of(cells)


REPLACEMENTS: list[tuple[str, Any]] = [
    ("null", None),
    ("text", "<x>"),
    ("list", [1, None]),
    ("number", -3.5),
]
INNER_REPLACEMENTS: list[tuple[str, Any]] = [("null", None), ("list", [[0.5], "<x>"])]


def damaged(record: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the record with each key in turn missing, null or of another type, two levels deep."""
    for key, value in record.items():
        for name, other in REPLACEMENTS:
            broken = copy.deepcopy(record)
            broken[key] = other
            yield f"{key} {name}", broken
        yield f"{key} missing", {k: v for k, v in record.items() if k != key}
        for inner in value if isinstance(value, dict) else ():
            for name, other in INNER_REPLACEMENTS:
                broken = copy.deepcopy(record)
                broken[key][inner] = other
                yield f"{key}.{inner} {name}", broken
