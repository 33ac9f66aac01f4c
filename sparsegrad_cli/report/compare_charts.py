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
from sparsegrad_cli.report.run_charts import score_points
from sparsegrad_cli.report.svg import (
    INK,
    Canvas,
    colour,
    grid,
    height_for,
    legend,
    marker,
    name_ticks,
    plain,
    whole_steps,
)


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
            tint = colour(place_of(compare, row))
            scores = [times * score for score in numbers(row, "scores")]
            if len(scores) > 1:
                bar = ([at + 0.12], [times * mean], [times * spread])
                axes.errorbar(*bar, fmt="_", ms=16, capsize=4, color=tint)
            kind = marker(place_of(compare, row))
            axes.plot([at - 0.08] * len(scores), scores, kind, ms=6, alpha=0.8, color=tint)
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
        axes.set(xlim=(-0.6, len(rows) - 0.4), ylabel=plain(scale_of_rows(rows).label))
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
    with Canvas(7.2, height_for(3.2, len(drawn) + 1)) as canvas:
        axes = canvas.axes
        for at, method, curves in drawn:
            for curve in curves:
                axes.plot(list(curve), list(curve.values()), lw=0.7, alpha=0.5, color=colour(at))
            shared = sorted(set.intersection(*(set(curve) for curve in curves)))
            means = [float(np.mean([curve[step] for curve in curves])) for step in shared]
            kind = marker(at)
            axes.plot(shared, means, marker=kind, ms=3.5, color=colour(at), label=plain(method))
        for level in _majorities(compare, task):
            axes.axhline(times * level, color=INK, lw=1, ls=":", label="majority class")
        axes.set(xlabel="optimizer step", ylabel=plain(scale.label))
        whole_steps(axes)
        grid(axes)
        legend(axes)
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
        tints = [colour(place_of(compare, row)) for row in rows]
        axes.barh(range(len(rows)), rates, 0.62, color=tints, xerr=spreads, ecolor=INK, capsize=3)
        axes.set_yticks(range(len(rows)), [plain(text(row, "method") or "?") for row in rows])
        axes.invert_yaxis()
        axes.set_xlabel("optimizer steps/s")
        grid(axes, "x")
    return canvas.svg()


def place_of(compare: Any, row: Any) -> int:
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
