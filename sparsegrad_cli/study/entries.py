"""A cell as its folder says it is, and as compare.json has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsegrad_cli.io.locks import owner_of
from sparsegrad_cli.recipe.study import Cell
from sparsegrad_cli.report.labels import status_of
from sparsegrad_cli.study.claims import holder_of
from sparsegrad_cli.study.folder import StudyFolder
from sparsegrad_cli.study.worker_pool import run_in

_UNTUNED = {
    "title": "Tuning",
    "what": "no trial of its tuning came to an end",
    "where": "tuning",
    "fix": "the trials' errors are in the report; the same command tries them again",
}


def entry_of(cell: Cell, place: StudyFolder, *, tuned: bool) -> dict[str, Any]:
    """What compare.json says of a cell.

    Args:
        cell: the cell.
        place: of the comparison.
        tuned: whether it has settings to run with.
    """
    folder = place.cell(cell)
    run = run_in(folder)
    status = status_of(run) if run else "pending"
    if status in ("pending", "running"):
        # Claimed by nobody, it was killed together with the process that ran it.
        dead = "interrupted" if run else "pending"
        alive = holder_of(claim_of(folder)) or owner_of(folder)
        status = "running" if alive else dead
    error = run.get("error") if run else None
    if not tuned:
        status, error = "failed", _UNTUNED
    return {
        "task": cell.task,
        "method": cell.label,
        "seed": cell.seed,
        "run_dir": str(folder.relative_to(place.path)),
        "status": status,
        "error": error,
        "run": _slim(run) if run else None,
    }


def _slim(run: dict[str, Any]) -> dict[str, Any]:
    slim = dict(run)
    calibration = slim.get("calibration")
    if isinstance(calibration, dict):
        dropped = ("heat_map", "spectra")
        slim["calibration"] = {k: v for k, v in calibration.items() if k not in dropped}
    return slim


def claim_of(folder: Path) -> Path:
    """The file that stands for the right to run the cell of a folder."""
    return folder.with_name(folder.name + ".claim")


def stamp(folder: Path) -> Any:
    """Changes with every run in the folder; None without one."""
    run = run_in(folder)
    return (run.get("started"), run.get("finished"), run.get("status")) if run else None
