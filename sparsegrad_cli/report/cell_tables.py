"""Tables of single cells, and of published figures beside ours."""

from __future__ import annotations

from typing import Any

from sparsegrad_cli.report.access import mappings, number, text
from sparsegrad_cli.report.compare_record import rows_of, scale_of_rows
from sparsegrad_cli.report.tables import Cell, Table
from sparsegrad_cli.report.units import format_number, format_score, format_spread
from sparsegrad_cli.report.words import reason, status_of, status_words
from sparsegrad_cli.scales import scale_of


def figures_table(compare: Any) -> Table | None:
    """Published figures beside ours, with the difference."""
    rows: list[tuple[Cell, ...]] = []
    for figure in mappings(compare, "figures"):
        task, method, score = text(figure, "task"), text(figure, "method"), number(figure, "score")
        if score is None:
            continue
        ours = [row for row in rows_of(compare, task or "") if text(row, "method") == method]
        mean, scale = number(ours[0], "score_mean") if ours else None, scale_of_rows(ours)
        rows.append(
            (
                *(text(figure, "source"), task, method),
                format_spread(score, number(figure, "std"), scale),
                format_spread(mean, number(ours[0], "score_std"), scale) if ours else None,
                format_score(mean - score, scale, sign=True) if mean is not None else None,
            )
        )
    if not rows:
        return None
    header = ("source", "task", "method", "published", "ours", "difference")
    return Table("Published figures beside ours", header, rows, left=3)


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
