"""Draw the figures of a study for one task. Each function returns SVG, or None without data."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from sparsegrad_cli.records.metric_direction import Scale
from sparsegrad_cli.records.run import RunRecord
from sparsegrad_cli.records.study import ResultRow, StudyRecord
from sparsegrad_cli.report.run_charts import memory_bars, score_points, sparsity_maps
from sparsegrad_cli.report.scores import (
    cells_of,
    methods_of,
    published_for,
    rows_of,
    scale_of_rows,
)
from sparsegrad_cli.report.svg import (
    INK,
    chart,
    colour,
    grid,
    heat_maps,
    height_for,
    legend,
    marker,
    name_ticks,
    plain,
    subplots,
    whole_steps,
)
from sparsegrad_cli.report.units import MIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PHASES = ("calibrate", "forward", "backward", "optimizer", "evaluate")
_MAX_MAPS = 8
_MAPS_ACROSS = 4


@chart
def score_dots(study: StudyRecord, task: str) -> Figure | None:
    """Draw a dot per seed, the mean with its standard deviation, and published scores."""
    rows = _scored(study, task)
    if not rows:
        return None
    scale = scale_of_rows(rows)
    figure, (axes,) = subplots(3.0)
    for at, row in enumerate(rows):
        place = _place(study, row)
        scores = [scale.times * score for score in row.scores if score is not None]
        if len(scores) > 1:
            mean, spread = scale.times * _mean(row), scale.times * (row.score_std or 0.0)
            bar = ([at + 0.12], [mean], [spread])
            axes.errorbar(*bar, fmt="_", ms=16, capsize=4, color=colour(place))
        dots = ([at - 0.08] * len(scores), scores)
        axes.plot(*dots, marker(place), ms=6, alpha=0.8, color=colour(place))
        for published in published_for(study, task, row.method):
            diamond = [scale.times * (published.score or 0.0)]
            axes.plot([at + 0.28], diamond, "D", ms=5, mfc="none", mec=INK)
    _majority_line(axes, study, task, scale)
    name_ticks(axes, [row.method for row in rows])
    axes.set(xlim=(-0.6, len(rows) - 0.4), ylabel=plain(scale.label))
    grid(axes)
    legend(axes)
    return figure


@chart
def learning_curves(study: StudyRecord, task: str) -> Figure | None:
    """Draw the mean validation score over steps by method, with a thin line per seed."""
    scale = scale_of_rows(rows_of(study, task))
    drawn = []
    for at, method in enumerate(methods_of(study)):
        found = [dict(score_points(run.metrics)) for run in _runs(study, task, method)]
        curves = [
            {step: scale.times * score for step, score in curve.items()} for curve in found if curve
        ]
        if curves:
            drawn.append((at, method, curves))
    if not drawn:
        return None
    figure, (axes,) = subplots(height_for(3.2, len(drawn) + 1))
    for at, method, curves in drawn:
        for curve in curves:
            axes.plot(list(curve), list(curve.values()), lw=0.7, alpha=0.5, color=colour(at))
        shared = sorted(set.intersection(*(set(curve) for curve in curves)))
        means = [fmean(curve[step] for curve in curves) for step in shared]
        line = axes.plot(shared, means, marker=marker(at), ms=3.5, color=colour(at))
        line[0].set_label(plain(method))
    _majority_line(axes, study, task, scale)
    axes.set(xlabel="optimizer step", ylabel=plain(scale.label))
    whole_steps(axes)
    grid(axes)
    legend(axes)
    return figure


@chart
def speed_bars(study: StudyRecord, task: str) -> Figure | None:
    """Draw optimizer steps per second with the range over seeds."""
    rows = [row for row in rows_of(study, task) if row.steps_per_s is not None]
    if not rows:
        return None
    figure, (axes,) = subplots(0.9 + 0.36 * len(rows))
    axes.barh(
        range(len(rows)),
        [row.steps_per_s or 0.0 for row in rows],
        0.62,
        color=[colour(_place(study, row)) for row in rows],
        xerr=[(row.steps_per_s_iqr or 0.0) / 2 for row in rows],
        ecolor=INK,
        capsize=3,
    )
    axes.set_yticks(range(len(rows)), [plain(row.method) for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("optimizer steps/s")
    grid(axes, "x")
    return figure


# --- memory


def memory_by_method(study: StudyRecord, task: str) -> str | None:
    """Draw the training step's peak by category in MiB, one bar per method."""
    rows = rows_of(study, task)
    return memory_bars([(r.method, r.memory_categories) for r in rows if r.memory_categories])


def memory_by_phase(study: StudyRecord, task: str) -> str | None:
    """Draw the peak of every phase by category in MiB, with the methods grouped by phase."""
    measured = []
    for row in rows_of(study, task):
        runs = (run.memory for run in _runs(study, task, row.method) if run.memory)
        found = next((memory.phases for memory in runs if memory.phases), {})
        measured.append((row.method, found))
    bars = [
        (f"{phase} · {method}", phases[phase].categories)
        for phase in _PHASES
        for method, phases in measured
        if phase in phases
    ]
    return memory_bars(bars, thickness=0.22)


@chart
def score_against_memory(study: StudyRecord, task: str) -> Figure | None:
    """Draw the score over the peak beyond the weights, with 95 % intervals if there are any."""
    rows = [row for row in _scored(study, task) if row.beyond_weights_bytes]
    if len(rows) < 2:
        return None
    scale = scale_of_rows(rows)
    figure, (axes,) = subplots(height_for(3.0, len(rows)))
    for row in rows:
        at, memory = _place(study, row), (row.beyond_weights_bytes or 0) / MIB
        mean = scale.times * _mean(row)
        if row.score_interval and row.seeds_done != 1:
            low, high = (scale.times * end for end in row.score_interval)
            bars = [[max(mean - low, 0.0)], [max(high - mean, 0.0)]]
            axes.errorbar([memory], [mean], bars, lw=1, capsize=3, color=colour(at))
        dot = axes.plot([memory], [mean], marker(at), ms=7, color=colour(at))
        dot[0].set_label(plain(row.method))
    widest = max(row.beyond_weights_bytes or 0 for row in rows)
    axes.set_xlim(left=0, right=1.1 * widest / MIB)
    axes.set_ylim(*_window(rows, scale))
    axes.set(xlabel="peak beyond the weights, MiB", ylabel=plain(scale.label))
    grid(axes, "both")
    legend(axes)
    return figure


def _window(rows: Sequence[ResultRow], scale: Scale) -> tuple[float, float]:
    """Return the limits of a score axis: twice the range of all seeds.

    The interval of two seeds is so wide that it would hide all differences, so the figure cuts it
    off.
    """
    scores = [scale.times * score for row in rows for score in row.scores if score is not None]
    scores += [scale.times * _mean(row) for row in rows]
    low, high = min(scores), max(scores)
    room = 0.5 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


@chart
def score_under_budget(study: StudyRecord, task: str) -> Figure | None:
    """Draw the best mean score that fits a memory budget, as steps over the budget, by method.

    Rows of one method (its sizes, its learning rates) make one curve. A budget must also be large
    enough for calibration.
    """
    families: dict[str, list[ResultRow]] = {}
    for row in _scored(study, task):
        if row.peak_charged_bytes is not None:
            families.setdefault(_family(study, row), []).append(row)
    if not families:
        return None
    every = [row for rows in families.values() for row in rows]
    scale = scale_of_rows(every)
    peaks = [(row.peak_charged_bytes or 0) / MIB for row in every]
    right = max(peaks) + 0.15 * (max(peaks) - min(peaks) or max(peaks))
    figure, (axes,) = subplots(height_for(3.0, len(families)))
    for at, (name, rows) in enumerate(families.items()):
        budgets, scores = _staircase(rows, scale)
        line = ([*budgets, right], [*scores, scores[-1]])
        style = "--" if any(row.seeds_done == 1 for row in rows) else "-"
        axes.step(*line, where="post", ls=style, color=colour(at), label=plain(name))
        axes.plot(budgets, scores, marker(at), ms=5, color=colour(at))
    axes.set_xlim(right=right)
    axes.set(xlabel="budget: peak with calibration, MiB", ylabel=plain(f"best {scale.label}"))
    grid(axes, "both")
    legend(axes)
    return figure


def _staircase(rows: Sequence[ResultRow], scale: Scale) -> tuple[list[float], list[float]]:
    """Return the (budgets in MiB, scores) from which a better row fits."""
    budgets: list[float] = []
    scores: list[float] = []
    for budget, score in sorted(((row.peak_charged_bytes or 0) / MIB, _mean(row)) for row in rows):
        if scores and scale.best([score, scores[-1]]) == scores[-1]:
            continue
        if budgets and budgets[-1] == budget:
            scores[-1] = score
        else:
            budgets.append(budget)
            scores.append(score)
    return budgets, [scale.times * score for score in scores]


def _family(study: StudyRecord, row: ResultRow) -> str:
    """Return the common name of a method's rows: ``sparsegrad core, static``."""
    methods = [run.method for run in _runs(study, row.task, row.method) if run.method]
    if not methods:
        return row.method
    first = " ".join(part for part in (methods[0].name, methods[0].form) if part)
    return f"{first}, {methods[0].support}" if methods[0].support else first


# --- which parameters changed


def changed_maps(study: StudyRecord, task: str) -> str | None:
    """Draw the changed share of each block of the middle target module, one map per method."""
    found = []
    for row in rows_of(study, task):
        blocks = [run.sparsity for run in _runs(study, task, row.method) if run.sparsity]
        found += [(row.method, blocks[0])] if blocks else []
    found = found[:_MAX_MAPS]
    if not found:
        return None
    across = min(_MAPS_ACROSS, len(found))
    down = -(-len(found) // across)
    return sparsity_maps(found, height=2.1 * down + 0.3, columns=across, rows=down)


@chart
def changed_by_target(study: StudyRecord, task: str) -> Figure | None:
    """Draw changed parameters as a share of the weights, by method and target module."""
    shares = {row.method: _changed_shares(study, row) for row in rows_of(study, task)}
    shares = {method: found for method, found in shares.items() if found}
    targets = list(dict.fromkeys(name for found in shares.values() for name in found))
    if not shares or len(targets) < 2:
        return None
    matrix = np.array(
        [[100.0 * found.get(name, np.nan) for name in targets] for found in shares.values()]
    )
    positive = matrix[np.isfinite(matrix) & (matrix > 0)]
    if not positive.size:
        return None
    figure, (axes,) = subplots(1.2 + 0.28 * len(shares))
    limits = (0.9 * float(positive.min()), 1.1 * float(positive.max()))
    bar = heat_maps(figure, [matrix], "% changed", limits, logarithmic=True)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    bar.ax.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    axes.set_yticks(range(len(shares)), [plain(method) for method in shares])
    axes.tick_params(length=0)
    axes.set(xlabel=f"{len(targets)} targets, in the order of the model")
    return figure


def _changed_shares(study: StudyRecord, row: ResultRow) -> dict[str, float]:
    """Return target module -> changed share, from the first seed that recorded it."""
    for run in _runs(study, row.task, row.method):
        found = {
            target.name: target.touched / size
            for target in (run.counts.targets if run.counts else [])
            if target.touched is not None and (size := target.out_features * target.in_features)
        }
        if found:
            return found
    return {}


# --- parts


def _runs(study: StudyRecord, task: str, method: str) -> list[RunRecord]:
    return [cell.run for cell in cells_of(study, task, method) if cell.run]


def _scored(study: StudyRecord, task: str) -> list[ResultRow]:
    return [row for row in rows_of(study, task) if row.score_mean is not None]


def _mean(row: ResultRow) -> float:
    return row.score_mean or 0.0


def _place(study: StudyRecord, row: ResultRow) -> int:
    """Return the index of a method, which gives it the same colour in every figure."""
    return methods_of(study).index(row.method)


def _majority_line(axes: Axes, study: StudyRecord, task: str, scale: Scale) -> None:
    """Draw the score of always predicting the most frequent class, as the first run recorded it."""
    for method in methods_of(study):
        for run in _runs(study, task, method):
            if run.task and run.task.majority_score is not None:
                level = scale.times * run.task.majority_score
                axes.axhline(level, color=INK, lw=1, ls=":", label="majority class")
                return
