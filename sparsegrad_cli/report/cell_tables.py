"""Tables of single cells."""

from __future__ import annotations

from typing import Any

from sparsegrad_cli.records.metric_direction import scale_of
from sparsegrad_cli.report.access import mappings, number, text
from sparsegrad_cli.report.labels import reason, status_of, status_words
from sparsegrad_cli.report.tables import Cell, Table
from sparsegrad_cli.report.units import format_number, format_score


def failures_table(compare: Any) -> Table | None:
    """Cells that are not done, with their reasons."""
    rows: list[tuple[Cell, ...]] = [
        (
            *(text(cell, key) for key in ("task", "method", "seed")),
            status_words(status_of(cell)),
            reason(cell.get("error"))
            or ("" if status_of(cell) in ("pending", "running") else None),
            text(cell, "error", "fix") or "",
        )
        for cell in mappings(compare, "cells")
        if status_of(cell) != "done"
    ]
    if not rows:
        return None
    header = ("task", "method", "seed", "status", "reason", "what to do")
    return Table("Cells that are not done", header, rows, left=6)


def cells_table(compare: Any) -> Table | None:
    """Every cell: its score, its speed, its folder."""
    rows: list[tuple[Cell, ...]] = []
    for cell in mappings(compare, "cells"):
        score = number(cell, "run", "metrics", "best", "score")
        scale = scale_of(text(cell, "run", "task", "metric"))
        rate = number(cell, "run", "time", "steps_per_s")
        rows.append(
            (
                *(text(cell, key) for key in ("task", "method", "seed")),
                status_words(status_of(cell)),
                text(cell, "run_dir"),
                None if score is None else format_score(score, scale),
                None if rate is None else format_number(rate),
            )
        )
    header = ("task", "method", "seed", "status", "folder", "score", "steps/s")
    return Table("Cells", header, rows, left=5) if rows else None
