"""A comparison's bytes, drawn: by phase and category, and what score they buy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparsegrad_cli.records.metric_direction import Scale
from sparsegrad_cli.report.access import number, numbers, text
from sparsegrad_cli.report.columns import method_name
from sparsegrad_cli.report.compare_charts import place_of
from sparsegrad_cli.report.compare_record import (
    Row,
    cells_of,
    interval_of,
    rows_of,
    scale_of_rows,
)
from sparsegrad_cli.report.labels import CATEGORIES
from sparsegrad_cli.report.run_charts import MIB
from sparsegrad_cli.report.run_tables import memory_phases
from sparsegrad_cli.report.svg import (
    Canvas,
    colour,
    grid,
    height_for,
    legend,
    marker,
    plain,
    stacked,
)

_PHASES = ("calibrate", "forward", "backward", "optimizer", "evaluate")


def memory_by_method(compare: Any, task: str) -> str | None:
    """The training step's peak by category, MiB, one bar a method."""
    rows = [row for row in rows_of(compare, task) if number(row, "peak_bytes") is not None]
    if not rows:
        return None
    layers = [
        (label, [(number(row, "memory_categories", key) or 0.0) / MIB for row in rows])
        for key, label in CATEGORIES.items()
    ]
    with Canvas(7.2, 0.9 + 0.36 * len(rows)) as canvas:
        stacked(canvas.axes, [method_name(row) for row in rows], layers)
        canvas.axes.set_xlabel("MiB")
        legend(canvas.axes)
    return canvas.svg()


def memory_by_phase(compare: Any, task: str) -> str | None:
    """The peak of every phase by category, MiB; phases below each other, methods within."""
    there = []
    for row in rows_of(compare, task):
        for cell in cells_of(compare, task, method_name(row)):
            phases = dict(memory_phases(cell.get("run")))
            if phases:
                there.append((method_name(row), phases))
                break
    shown = [
        (f"{phase} · {method}", phases[phase])
        for phase in _PHASES
        for method, phases in there
        if phase in phases
    ]
    if not shown:
        return None
    layers = [
        (label, [(number(peak, "categories", key) or 0.0) / MIB for _, peak in shown])
        for key, label in CATEGORIES.items()
    ]
    with Canvas(7.2, 0.9 + 0.22 * len(shown)) as canvas:
        stacked(canvas.axes, [name for name, _ in shown], layers)
        canvas.axes.set_xlabel("MiB")
        legend(canvas.axes)
    return canvas.svg()


def score_against_memory(compare: Any, task: str) -> str | None:
    """Score over peak memory beyond the weights, with 95 % intervals where there are seeds."""
    there = [row for row in _scored(compare, task) if number(row, "beyond_weights_bytes")]
    if len(there) < 2:
        return None
    scale = scale_of_rows(there)
    widest = max(number(row, "beyond_weights_bytes") or 0.0 for row in there)
    with Canvas(7.2, height_for(3.0, len(there))) as canvas:
        axes = canvas.axes
        for row in there:
            at = place_of(compare, row)
            memory = (number(row, "beyond_weights_bytes") or 0.0) / MIB
            mean = scale.times * (number(row, "score_mean") or 0.0)
            low, high = (scale.times * (end or 0.0) for end in interval_of(row, "score_interval"))
            if number(row, "seeds_done") != 1 and high > low:
                axes.errorbar(
                    [memory],
                    [mean],
                    [[mean - low], [high - mean]],
                    lw=1,
                    capsize=3,
                    color=colour(at),
                )
            label = plain(method_name(row))
            axes.plot([memory], [mean], marker(at), ms=7, color=colour(at), label=label)
        axes.set_xlim(left=0, right=1.1 * widest / MIB)
        axes.set_ylim(*_window(there, scale))
        axes.set(xlabel="peak beyond the weights, MiB", ylabel=plain(scale.label))
        grid(axes, "both")
        legend(axes)
    return canvas.svg()


def _scored(compare: Any, task: str) -> list[Row]:
    return [row for row in rows_of(compare, task) if number(row, "score_mean") is not None]


def _window(rows: Sequence[Row], scale: Scale) -> tuple[float, float]:
    """Limits of a score axis: twice the range of all seeds. An interval of two seeds is so wide
    that nothing could be told apart beside it; it leaves the figure."""
    scores = [scale.times * score for row in rows for score in numbers(row, "scores")]
    scores += [scale.times * (number(row, "score_mean") or 0.0) for row in rows]
    low, high = min(scores), max(scores)
    room = 0.5 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def score_under_budget(compare: Any, task: str) -> str | None:
    """The best mean score that fits a memory budget, as a step over the budget, by method.

    Rows of one method (its sizes, its rates) are one curve. A budget has to hold calibration, too.
    """
    families: dict[str, list[Row]] = {}
    for row in _scored(compare, task):
        if number(row, "peak_charged_bytes") is not None:
            families.setdefault(_family(compare, task, row), []).append(row)
    if not families:
        return None
    every = [row for rows in families.values() for row in rows]
    scale = scale_of_rows(every)
    peaks = [(number(row, "peak_charged_bytes") or 0.0) / MIB for row in every]
    right = max(peaks) + 0.15 * (max(peaks) - min(peaks) or max(peaks))
    with Canvas(7.2, height_for(3.0, len(families))) as canvas:
        axes = canvas.axes
        for at, (name, rows) in enumerate(families.items()):
            budgets, scores = _staircase(rows, scale)
            one_seed = any(number(row, "seeds_done") == 1 for row in rows)
            axes.step(
                [*budgets, right],
                [*scores, scores[-1]],
                where="post",
                ls="--" if one_seed else "-",
                color=colour(at),
                label=plain(name),
            )
            axes.plot(budgets, scores, marker(at), ms=5, color=colour(at))
        axes.set_xlim(right=right)
        axes.set(xlabel="budget: peak with calibration, MiB", ylabel=plain(f"best {scale.label}"))
        grid(axes, "both")
        legend(axes)
    return canvas.svg()


def _staircase(rows: Sequence[Row], scale: Scale) -> tuple[list[float], list[float]]:
    """(budgets, scores): where a larger budget begins to allow a better row."""
    found = sorted(
        ((number(row, "peak_charged_bytes") or 0.0) / MIB, number(row, "score_mean") or 0.0)
        for row in rows
    )
    budgets: list[float] = []
    scores: list[float] = []
    for budget, score in found:
        if scores and scale.best([score, scores[-1]]) == scores[-1]:
            continue
        if budgets and budgets[-1] == budget:
            scores[-1] = score
        else:
            budgets.append(budget)
            scores.append(score)
    return budgets, [scale.times * score for score in scores]


def _family(compare: Any, task: str, row: Row) -> str:
    """``sparsegrad core, static``: what the rows of one method have in common."""
    for cell in cells_of(compare, task, method_name(row)):
        name = text(cell, "run", "method", "name")
        if name:
            form, support = (text(cell, "run", "method", key) for key in ("form", "support"))
            first = f"{name} {form}" if form else name
            return f"{first}, {support}" if support else first
    return method_name(row)
