"""The figures of a comparison, per task. None where the record has nothing to draw."""

from __future__ import annotations

from typing import Any

import numpy as np

from sparsegrad_cli.report.access import number, numbers, text
from sparsegrad_cli.report.compare_record import (
    cells_of,
    figures_of,
    methods_of,
    rows_of,
    scale_of_rows,
)
from sparsegrad_cli.report.run_charts import MIB, score_points
from sparsegrad_cli.report.svg import (
    INK,
    Canvas,
    colour,
    grid,
    legend,
    name_ticks,
    plain,
    stacked,
    whole_steps,
)
from sparsegrad_cli.report.words import CATEGORIES


def score_dots(compare: Any, task: str) -> str | None:
    """One dot a seed, the mean with its standard deviation, the published figure as a diamond."""
    rows = [row for row in rows_of(compare, task) if number(row, "score_mean") is not None]
    if not rows:
        return None
    times = scale_of_rows(rows).times
    with Canvas(7.2, 3.0) as canvas:
        axes = canvas.axes
        for at, row in enumerate(rows):
            mean, spread = number(row, "score_mean") or 0, number(row, "score_std") or 0
            tint = colour(_place(compare, row))
            scores = [times * score for score in numbers(row, "scores")]
            if len(scores) > 1:
                bar = ([at + 0.12], [times * mean], [times * spread])
                axes.errorbar(*bar, fmt="_", ms=16, capsize=4, color=tint)
            axes.plot([at - 0.08] * len(scores), scores, "o", ms=6, alpha=0.8, color=tint)
            for figure in figures_of(compare, task, text(row, "method")):
                axes.plot(
                    [at + 0.28],
                    [times * (number(figure, "score") or 0)],
                    "D",
                    ms=5,
                    mfc="none",
                    mec=INK,
                )
        for level in _majorities(compare, task):
            axes.axhline(times * level, color=INK, lw=1, ls=":", label="majority class")
        name_ticks(axes, [text(row, "method") or "?" for row in rows])
        axes.set(xlim=(-0.6, len(rows) - 0.4), ylabel=scale_of_rows(rows).label)
        grid(axes)
        legend(axes)
    return canvas.svg()


def learning_curves(compare: Any, task: str) -> str | None:
    """Mean validation score over steps by method, each seed thin behind it."""
    drawn = []
    for at, method in enumerate(methods_of(compare)):
        curves = [dict(score_points(cell.get("run"))) for cell in cells_of(compare, task, method)]
        curves = [curve for curve in curves if curve]
        if curves:
            drawn.append((at, method, curves))
    if not drawn:
        return None
    scale = scale_of_rows(rows_of(compare, task))
    times = scale.times
    with Canvas(7.2, 3.2) as canvas:
        axes = canvas.axes
        for at, method, curves in drawn:
            for curve in curves:
                axes.plot(list(curve), list(curve.values()), lw=0.7, alpha=0.5, color=colour(at))
            shared = sorted(set.intersection(*(set(curve) for curve in curves)))
            means = [float(np.mean([curve[step] for curve in curves])) for step in shared]
            axes.plot(shared, means, marker="o", ms=3.5, color=colour(at), label=plain(method))
        for level in _majorities(compare, task):
            axes.axhline(times * level, color=INK, lw=1, ls=":", label="majority class")
        axes.set(xlabel="optimizer step", ylabel=scale.label)
        whole_steps(axes)
        grid(axes)
        legend(axes)
    return canvas.svg()


def score_against_memory(compare: Any, task: str) -> str | None:
    """Score over peak memory beyond the weights."""
    found = [
        (row, number(row, "beyond_weights_bytes"), number(row, "score_mean"))
        for row in rows_of(compare, task)
    ]
    there = [
        (row, memory, score)
        for row, memory, score in found
        if memory is not None and score is not None
    ]
    if len(there) < 2 or not any(memory for _, memory, _ in there):
        return None
    scale = scale_of_rows([row for row, _, _ in there])
    with Canvas(7.2, 3.0) as canvas:
        axes = canvas.axes
        for row, memory, score in there:
            spread = scale.times * (number(row, "score_std") or 0.0)
            name, tint = plain(text(row, "method") or "?"), colour(_place(compare, row))
            axes.errorbar(
                [memory / MIB],
                [scale.times * score],
                [spread],
                fmt="o",
                ms=7,
                capsize=3,
                color=tint,
                label=name,
            )
        axes.set_xlim(left=0, right=1.1 * max(memory for _, memory, _ in there) / MIB)
        axes.set(
            xlabel="peak beyond the weights, MiB",
            ylabel=scale.label,
        )
        grid(axes, "both")
        legend(axes)
    return canvas.svg()


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
        stacked(canvas.axes, [text(row, "method") or "?" for row in rows], layers)
        canvas.axes.set_xlabel("MiB")
        legend(canvas.axes)
    return canvas.svg()


def speed_bars(compare: Any, task: str) -> str | None:
    """Optimizer steps a second, the interquartile range as a bar."""
    rows = [row for row in rows_of(compare, task) if number(row, "steps_per_s") is not None]
    if not rows:
        return None
    rates = [number(row, "steps_per_s") or 0.0 for row in rows]
    spreads = [(number(row, "steps_per_s_iqr") or 0.0) / 2 for row in rows]
    with Canvas(7.2, 0.9 + 0.36 * len(rows)) as canvas:
        axes = canvas.axes
        tints = [colour(_place(compare, row)) for row in rows]
        axes.barh(range(len(rows)), rates, 0.62, color=tints, xerr=spreads, ecolor=INK, capsize=3)
        axes.set_yticks(range(len(rows)), [plain(text(row, "method") or "?") for row in rows])
        axes.invert_yaxis()
        axes.set_xlabel("optimizer steps/s")
        grid(axes, "x")
    return canvas.svg()


def _place(compare: Any, row: Any) -> int:
    """A method keeps its colour in every figure."""
    names = methods_of(compare)
    name = text(row, "method")
    return names.index(name) if name in names else 0


def _majorities(compare: Any, task: str) -> list[float]:
    """The majority class's score, as the cells recorded it; one value, or none."""
    for method in methods_of(compare):
        for cell in cells_of(compare, task, method):
            level = number(cell, "run", "task", "majority_score")
            if level is not None:
                return [level]
    return []
