"""Draw the figures of a study for one task. Each returns a drawing, or None without data."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from sparsegrad_cli.records.metric_direction import Scale
from sparsegrad_cli.records.run import MemoryCategories, RunRecord, SparsityBlock
from sparsegrad_cli.records.study import ResultRow, StudyRecord
from sparsegrad_cli.report.document import Drawing
from sparsegrad_cli.report.run_charts import (
    Points,
    memory_bars,
    score_points,
    sparsity_maps,
)
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
    few_ticks,
    grid,
    heat_maps,
    log_ticks,
    marker,
    name_rows,
    plain,
    point_tips,
    subplots,
    tip,
    whole_steps,
)
from sparsegrad_cli.report.units import MIB, format_mib, format_number, format_score

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PHASES = ("calibrate", "forward", "backward", "optimizer", "evaluate")
_MAX_MAPS = 8
_MAPS_ACROSS = 2


@chart
def score_dots(study: StudyRecord, task: str) -> Figure | None:
    """Draw a dot per seed, the mean with its standard deviation, and published scores.

    The score of the majority class is drawn if it lies between the others; elsewhere it would press
    them together.
    """
    rows = _scored(study, task)
    if not rows:
        return None
    scale = scale_of_rows(rows)
    figure, (axes,) = subplots(0.6 + 0.4 * len(rows))
    for at, row in enumerate(rows):
        place = _place(study, row)
        scores = [scale.times * score for score in row.scores if score is not None]
        if len(scores) > 1:
            mean, spread = scale.times * _mean(row), scale.times * (row.score_std or 0.0)
            bar = ([mean], [at + 0.14], None, [spread])
            axes.errorbar(*bar, fmt="|", ms=13, capsize=4, color=colour(place))
        dots = (scores, [at - 0.1] * len(scores))
        axes.plot(*dots, marker(place), ms=6, alpha=0.8, color=colour(place))
        texts = [f"{row.method}: {format_score(s, scale)}" for s in row.scores if s is not None]
        point_tips(axes, list(zip(*dots, strict=True)), texts)
        for published in published_for(study, task, row.method):
            diamond = axes.plot(
                [scale.times * (published.score or 0.0)], [at + 0.3], "D", ms=5, mfc="none", mec=INK
            )
            diamond[0].set_label("published")
            tip(diamond[0], f"{published.source}: {format_score(published.score, scale)}")
    baseline, (low, high) = _baseline(study, task), axes.get_xlim()
    if baseline is not None and low <= scale.times * baseline[1] <= high:
        axes.axvline(scale.times * baseline[1], color=INK, lw=1, ls=":", label=baseline[0])
    name_rows(axes, [row.method for row in rows])
    axes.set_xlabel(plain(scale.label))
    few_ticks(axes.xaxis)
    grid(axes, "x")
    return figure


@chart
def learning_curves(study: StudyRecord, task: str) -> Figure | None:
    """Draw the mean validation score over steps by method, with a thin line per seed."""
    scale = scale_of_rows(rows_of(study, task))
    drawn = []
    for at, method in enumerate(methods_of(study)):
        curves = [
            [(step, scale.times * score) for step, score in curve]
            for curve in seed_curves(study, task, method)
        ]
        if curves:
            drawn.append((at, method, curves))
    if not drawn:
        return None
    figure, (axes,) = subplots(2.8)
    for at, method, curves in drawn:
        for curve in curves if len(curves) > 1 else ():
            axes.plot(*zip(*curve, strict=True), lw=0.7, alpha=0.5, color=colour(at))
        means = mean_curve(curves)
        if not means:
            continue
        line = axes.plot(*zip(*means, strict=True), marker=marker(at), ms=3.5, color=colour(at))
        line[0].set_label(plain(method))
        texts = [f"{method}, step {step:,}: {score:.{scale.digits}f}" for step, score in means]
        point_tips(axes, means, texts)
    baseline = _baseline(study, task)
    if baseline is not None:
        axes.axhline(scale.times * baseline[1], color=INK, lw=1, ls=":", label=baseline[0])
    axes.set(xlabel="optimizer step", ylabel=plain(scale.label))
    whole_steps(axes)
    few_ticks(axes.yaxis)
    grid(axes)
    return figure


def seed_curves(study: StudyRecord, task: str, method: str) -> list[Points]:
    """Return the (step, score) of each seed's evaluations; seeds without any are left out."""
    found = [score_points(run.metrics) for run in _runs(study, task, method)]
    return [curve for curve in found if curve]


def mean_curve(curves: Sequence[Points]) -> Points:
    """Return the mean over seeds at the steps that all seeds have evaluated."""
    by_step = [dict(curve) for curve in curves]
    shared = sorted(set.intersection(*(set(curve) for curve in by_step))) if by_step else []
    return [(step, fmean(curve[step] for curve in by_step)) for step in shared]


@chart
def speed_bars(study: StudyRecord, task: str) -> Figure | None:
    """Draw optimizer steps per second with the range over seeds."""
    rows = [row for row in rows_of(study, task) if row.steps_per_s is not None]
    if not rows:
        return None
    figure, (axes,) = subplots(0.6 + 0.34 * len(rows))
    bars = axes.barh(
        range(len(rows)),
        [row.steps_per_s or 0.0 for row in rows],
        0.62,
        color=[colour(_place(study, row)) for row in rows],
        xerr=[(row.steps_per_s_iqr or 0.0) / 2 for row in rows],
        ecolor=INK,
        capsize=3,
    )
    for bar, row in zip(bars, rows, strict=True):
        tip(bar, f"{row.method}: {format_number(row.steps_per_s)} steps/s")
    name_rows(axes, [row.method for row in rows])
    axes.set_xlabel("optimizer steps/s")
    few_ticks(axes.xaxis)
    grid(axes, "x")
    return figure


# --- memory


def memory_by_method(study: StudyRecord, task: str) -> Drawing | None:
    """Draw the training step's peak by category in MiB, one bar per method."""
    rows = rows_of(study, task)
    return memory_bars([(r.method, r.memory_categories) for r in rows if r.memory_categories])


def memory_by_phase(study: StudyRecord, task: str) -> Drawing | None:
    """Draw the peak of every phase by category in MiB, with the methods grouped by phase."""
    return memory_bars(phase_bars(study, task), thickness=0.22)


def phase_bars(study: StudyRecord, task: str) -> list[tuple[str, MemoryCategories]]:
    """Return (phase and method, bytes by category) of each method's first run, by phase."""
    measured = []
    for row in rows_of(study, task):
        runs = (run.memory for run in _runs(study, task, row.method) if run.memory)
        found = next((memory.phases for memory in runs if memory.phases), {})
        measured.append((row.method, found))
    return [
        (f"{phase} · {method}", phases[phase].categories)
        for phase in _PHASES
        for method, phases in measured
        if phase in phases
    ]


@chart
def score_against_memory(study: StudyRecord, task: str) -> Figure | None:
    """Draw the score over the peak beyond the weights, with 95 % intervals if there are any."""
    rows = [row for row in _scored(study, task) if row.beyond_weights_bytes]
    if len(rows) < 2:
        return None
    scale = scale_of_rows(rows)
    figure, (axes,) = subplots(2.8)
    for row in rows:
        at, memory = _place(study, row), (row.beyond_weights_bytes or 0) / MIB
        mean = scale.times * _mean(row)
        if row.score_interval and row.seeds_done != 1:
            low, high = (scale.times * end for end in scale.clip(row.score_interval) or [])
            bars = [[max(mean - low, 0.0)], [max(high - mean, 0.0)]]
            axes.errorbar([memory], [mean], bars, lw=1, capsize=3, color=colour(at))
        dot = axes.plot([memory], [mean], marker(at), ms=7, color=colour(at))
        dot[0].set_label(plain(row.method))
        score = format_score(row.score_mean, scale)
        tip(dot[0], f"{row.method}: {score} at {format_mib(row.beyond_weights_bytes)} MiB")
    widest = max(row.beyond_weights_bytes or 0 for row in rows)
    axes.set_xlim(left=0, right=1.1 * widest / MIB)
    axes.set_ylim(*_window(rows, scale))
    axes.set(xlabel="peak beyond the weights, MiB", ylabel=plain(scale.label))
    few_ticks(axes.xaxis)
    few_ticks(axes.yaxis)
    grid(axes, "both")
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
    figure, (axes,) = subplots(2.8)
    for at, (name, rows) in enumerate(families.items()):
        budgets, scores = _staircase(rows, scale)
        line = ([*budgets, right], [*scores, scores[-1]])
        style = "--" if any(row.seeds_done == 1 for row in rows) else "-"
        axes.step(*line, where="post", ls=style, color=colour(at), label=plain(name))
        axes.plot(budgets, scores, marker(at), ms=5, color=colour(at))
        points = list(zip(budgets, scores, strict=True))
        texts = [f"{name}: {s:.{scale.digits}f} from {b:,.1f} MiB" for b, s in points]
        point_tips(axes, points, texts)
    axes.set_xlim(right=right)
    axes.set(xlabel="budget: peak with calibration, MiB", ylabel=plain(f"best {scale.label}"))
    few_ticks(axes.xaxis)
    few_ticks(axes.yaxis)
    grid(axes, "both")
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
    # One name stands for all tuners of PEFT; their type tells them apart.
    if not methods or "type" in methods[0].settings:
        return row.method
    first = " ".join(part for part in (methods[0].name, methods[0].form) if part)
    return f"{first}, {methods[0].support}" if methods[0].support else first


# --- which parameters changed


def changed_maps(study: StudyRecord, task: str) -> Drawing | None:
    """Draw the changed share of each block of the middle target module, one map per method."""
    found = first_maps(study, task)
    if not found:
        return None
    across = min(_MAPS_ACROSS, len(found))
    down = -(-len(found) // across)
    return sparsity_maps(found, height=2.2 * down, columns=across, rows=down)


def first_maps(study: StudyRecord, task: str) -> list[tuple[str, SparsityBlock]]:
    """Return (method, map) of the first run of each method that leaves parameters out."""
    found = []
    for row in rows_of(study, task):
        blocks = [run.sparsity for run in _runs(study, task, row.method) if run.sparsity]
        found += [(row.method, blocks[0])] if blocks else []
    return found[:_MAX_MAPS]


@chart
def changed_by_target(study: StudyRecord, task: str) -> Figure | None:
    """Draw changed parameters as a share of the weights, by method and target module."""
    shares = {row.method: changed_shares(study, row) for row in rows_of(study, task)}
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
    figure, (axes,) = subplots(0.9 + 0.28 * len(shares))
    limits = (0.9 * float(positive.min()), 1.1 * float(positive.max()))
    bar = heat_maps(figure, [matrix], "% changed", limits, logarithmic=True)
    log_ticks(bar.ax.yaxis)
    name_rows(axes, list(shares))
    axes.set(xlabel=f"target module 1 to {len(targets)}, in the order of the model")
    return figure


def changed_shares(study: StudyRecord, row: ResultRow) -> dict[str, float]:
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


def _baseline(study: StudyRecord, task: str) -> tuple[str, float] | None:
    """Return what always giving the same answer scores, from the first run that recorded it."""
    runs = (run for method in methods_of(study) for run in _runs(study, task, method))
    return next((run.task.baseline for run in runs if run.task and run.task.baseline), None)
