"""Reading a comparison's record: its tasks, methods, rows, differences and checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparsegrad_cli.records.metric_direction import Scale, scale_of
from sparsegrad_cli.report.access import dig, items, mappings, number, numbers, text
from sparsegrad_cli.report.units import format_interval, format_score

MIN_SEEDS = 2  # below, nothing is ranked
Row = Mapping[str, Any]


def tasks_of(compare: Any) -> list[str]:
    """Tasks in the order asked for, then any that only rows or cells name."""
    named = [text(task) for task in items(compare, "tasks")]
    named += [text(row, "task") for row in mappings(compare, "rows")]
    named += [text(cell, "task") for cell in mappings(compare, "cells")]
    return list(dict.fromkeys(name for name in named if name))


def methods_of(compare: Any) -> list[str]:
    """Methods in the order asked for, then any that only rows or cells name."""
    named = [text(name) for name in items(compare, "methods")]
    named += [text(row, "method") for row in mappings(compare, "rows")]
    named += [text(cell, "method") for cell in mappings(compare, "cells")]
    return list(dict.fromkeys(name for name in named if name))


def rows_of(compare: Any, task: str) -> list[Row]:
    """The rows of a task, one a method."""
    return [row for row in mappings(compare, "rows") if text(row, "task") == task]


def metric_of_rows(rows: Sequence[Row]) -> str | None:
    """The metric of a task's scores, as the first row that has any says."""
    return next((text(row, "metric") for row in rows if text(row, "metric")), None)


def scale_of_rows(rows: Sequence[Row]) -> Scale:
    """The scale of a task's scores."""
    positive = next((text(row, "positive_label") for row in rows if text(row, "metric")), None)
    return scale_of(metric_of_rows(rows), positive)


def cells_of(compare: Any, task: str, method: str) -> list[Row]:
    """The cells of a task and method, one a seed."""
    return [
        cell
        for cell in mappings(compare, "cells")
        if text(cell, "task") == task and text(cell, "method") == method
    ]


def figures_in(compare: Any) -> list[Row]:
    """All published figures."""
    return mappings(compare, "figures")


def figures_of(compare: Any, task: str | None, method: str | None) -> list[Row]:
    """Published figures for a task and method."""
    return [
        figure
        for figure in figures_in(compare)
        if (text(figure, "task"), text(figure, "method")) == (task, method)
        and number(figure, "score") is not None
    ]


def interval_of(data: Any, *keys: str) -> tuple[float | None, float | None]:
    """(low, high) of an interval in a record; Nones where there is none."""
    ends = numbers(data, *keys)
    return (ends[0], ends[1]) if len(ends) == 2 else (None, None)


def difference_cell(row: Row) -> str:
    """``+1.0 (−2.1 to 4.1)`` or ``+1.0 (one seed)``; empty for the method set against."""
    found = dig(row, "difference")
    mean, scale = number(found, "mean"), scale_of(text(row, "metric"))
    if mean is None:
        return ""
    shown = format_score(mean, scale, sign=True)
    interval = format_interval(*interval_of(found, "interval"), scale)
    if interval is None:
        n = number(found, "n")
        interval = "one seed" if n == 1 else "no interval"
    return f"{shown} ({interval})"


def reference_of(rows: Sequence[Row]) -> str | None:
    """The method that differences are taken against."""
    for row in rows:
        name = text(row, "difference", "against")
        if name:
            return name
    return None


def best_rows(rows: Sequence[Row]) -> list[int]:
    """Which rows have the best mean; none where any score is one seed's: that ranks nothing."""
    there = {
        at: mean for at, row in enumerate(rows) if (mean := number(row, "score_mean")) is not None
    }
    seeds = [number(rows[at], "seeds_done") or 0 for at in there]
    if len(there) < 2 or min(seeds) < MIN_SEEDS:
        return []
    best = scale_of_rows(rows).best(there.values())
    return [at for at, mean in there.items() if mean == best]


def seeds_remark(rows: Sequence[Row]) -> str | None:
    """Says plainly where a score is one seed's."""
    counts = [number(r, "seeds_done") for r in rows if number(r, "score_mean") is not None]
    fewest = min((count for count in counts if count is not None), default=MIN_SEEDS)
    if fewest >= MIN_SEEDS:
        return None
    return "n = 1: one seed ranks nothing, and its score has no interval"


def bold_remark(rows: Sequence[Row]) -> str | None:
    """What bold type means, where there is any."""
    if not best_rows(rows):
        return None
    return "bold is the best mean; whether it is better than another is said under Differences"
