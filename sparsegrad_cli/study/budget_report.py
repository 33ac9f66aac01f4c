"""What the runs of a comparison took of their budget, against what was asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparsegrad_cli.report.access import mappings, number, text
from sparsegrad_cli.study.costs import TRAIN_STEP, train_step_peak

TOLERANCE = 0.05  # of the request: beyond, either way, a row is flagged
MEASURED = ("runs", "measured", "deviation", "verdict")  # what a row has of its runs
Run = Mapping[str, Any]


def with_measured(budget: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The ``budget`` block with what the finished cells took.

    Every row gets ``runs`` (how many say it), ``measured`` (the most of any seed), ``deviation``
    (of the seed furthest from the request, as a share of it, above zero where more was taken) and
    ``verdict``: ``met`` within the tolerance, ``over``, ``under``, or null where nothing was
    measured or the row is outside of the budget.
    """
    kind, request = text(budget, "kind"), number(budget, "request")
    rows = []
    for row in mappings(budget, "rows"):
        runs = [
            cell["run"]
            for cell in cells
            if (cell.get("task"), cell.get("method")) == (row.get("task"), row.get("method"))
            and cell.get("status") == "done"
            and isinstance(cell.get("run"), Mapping)
        ]
        taken = [value for run in runs if (value := measured(run, kind)) is not None]
        rows.append({**row, **_against(taken, request, row.get("matched") is not False)})
    return {**budget, "rows": rows}


def _against(taken: Sequence[float], request: float | None, matched: bool) -> dict[str, Any]:
    if not taken or not request:
        return {"runs": len(taken), "measured": None, "deviation": None, "verdict": None}
    deviation = max((value / request - 1 for value in taken), key=abs)
    verdict = "over" if deviation > TOLERANCE else "under" if deviation < -TOLERANCE else "met"
    return {
        "runs": len(taken),
        "measured": max(taken),
        "deviation": deviation,
        "verdict": verdict if matched else None,
    }


def measured(run: Run, kind: str | None) -> float | None:
    """What a run took of a kind of budget, as it counted it itself."""
    if kind == "trainable":
        return number(run, "counts", "trainable_targets")
    if kind == "optimizer_state":
        kept = number(run, "sizes", "optimizer_state_bytes")  # at the end; else in the probe
        keys = ("categories", "optimizer_state")
        held = [number(run, "memory", "phases", phase, *keys) for phase in TRAIN_STEP]
        found = [kept] if kept is not None else [value for value in held if value is not None]
        return max(found, default=None)
    if kind == "peak":
        step = number(train_step_peak(run), "peak_bytes")
        calibration = number(run, "calibration", "peak_bytes")
        return None if step is None else max(step, calibration or 0)
    return None
