"""Reading a comparison's record: its tasks, methods, rows, differences and checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparsegrad_cli.report.access import dig, items, mappings, number, text
from sparsegrad_cli.report.units import format_p, format_score
from sparsegrad_cli.scales import Scale, scale_of

FEW_SEEDS = 3  # below: no test can tell; up to WEAK_TEST: only a large, steady difference shows
WEAK_TEST = 5
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


def scale_of_rows(rows: Sequence[Row]) -> Scale:
    """The scale of a task's scores."""
    return scale_of(next((text(row, "metric") for row in rows if text(row, "metric")), None))


def cells_of(compare: Any, task: str, method: str) -> list[Row]:
    """The cells of a task and method, one a seed."""
    return [
        cell
        for cell in mappings(compare, "cells")
        if text(cell, "task") == task and text(cell, "method") == method
    ]


def figures_of(compare: Any, task: str | None, method: str | None) -> list[Row]:
    """Published figures for a task and method."""
    return [
        figure
        for figure in mappings(compare, "figures")
        if (text(figure, "task"), text(figure, "method")) == (task, method)
        and number(figure, "score") is not None
    ]


def difference_cell(row: Row) -> str:
    """``+1.0 (p 0.30, n 2)``; empty for the method that the others are set against."""
    found = dig(row, "difference")
    mean = number(found, "mean")
    if mean is None:
        return ""
    p, n = number(found, "p"), number(found, "n")
    parts = [f"p {format_p(p)}" if p is not None else "no p"]
    if n is not None:
        parts.append(f"n {n:.0f}")
    shown = format_score(mean, scale_of(text(row, "metric")), sign=True)
    return f"{shown} ({', '.join(parts)})"


def reference_of(rows: Sequence[Row]) -> str | None:
    """The method that differences are taken against."""
    for row in rows:
        name = text(row, "difference", "against")
        if name:
            return name
    return None


def seeds_remark(rows: Sequence[Row]) -> str | None:
    """Says plainly when there are too few seeds for the test to mean much."""
    counts = [n for n in (number(row, "difference", "n") for row in rows) if n is not None]
    fewest = min(counts, default=None)
    if fewest is None or fewest >= WEAK_TEST:
        return None
    if fewest < FEW_SEEDS:
        return f"n = {fewest:.0f}: too few seeds for a test to tell a difference from chance"
    return f"n = {fewest:.0f}: few seeds, only a large and steady difference can show"


def check_lines(compare: Any) -> list[tuple[bool | None, str]]:
    """(held, sentence): together where all checks hold, one line for each that does not."""
    checks = mappings(compare, "checks")
    if not checks:
        return [(None, "Same head, order and data: not recorded.")]
    keys = {"same_head_init": "head", "same_order": "order", "same_data": "data"}
    lines: list[tuple[bool | None, str]] = []
    held, unknown = [], 0
    for check in checks:
        wrong = [word for key, word in keys.items() if dig(check, key) is False]
        if wrong:
            where = f"{text(check, 'task') or '?'}, seed {text(check, 'seed') or '?'}"
            lines.append((False, f"{where}: methods did NOT have the same {' and '.join(wrong)}."))
        elif all(dig(check, key) is True for key in keys):
            held.append(number(check, "steps_compared"))
        else:
            unknown += 1
    if unknown:
        pairs = f"{unknown} of {len(checks)} pairs of task and seed"
        lines.insert(0, (None, f"{pairs}: fewer than two methods to compare."))
    if held:
        steps = [count for count in held if count]
        upto = f" (order over at least {min(steps):,.0f} steps)" if steps else ""
        pairs = f"{len(held)} of {len(checks)} pairs of task and seed"
        lines.insert(0, (True, f"{pairs}: all methods had the same head, order and data{upto}."))
    return lines
