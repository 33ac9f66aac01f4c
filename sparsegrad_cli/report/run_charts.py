"""Draw the figures of one run. Each function returns a drawing, or None without data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from sparsegrad_cli.records.metric_direction import Scale
from sparsegrad_cli.records.run import (
    HeatMap,
    MemoryCategories,
    MetricsBlock,
    SparsityBlock,
    Spectrum,
)
from sparsegrad_cli.report.document import Drawing
from sparsegrad_cli.report.svg import (
    INK,
    chart,
    colour,
    few_ticks,
    grid,
    heat_maps,
    log_ticks,
    name_rows,
    plain,
    point_tips,
    short,
    stacked,
    subplots,
    tip,
    whole_steps,
)
from sparsegrad_cli.report.units import CATEGORIES, MIB, format_number, format_score

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAX_SPECTRA = 12
_DARKEST = 1e-4  # Darkest value of a heat map, as a share of the largest entry.

Points = list[tuple[int, float]]


def score_points(metrics: MetricsBlock | None) -> Points:
    """Return (step, score) of every evaluation, including the one before training."""
    if metrics is None:
        return []
    every = [*([metrics.initial] if metrics.initial else []), *metrics.history]
    return list({one.step: one.score for one in every if one.score is not None}.items())


@chart
def learning_curve(
    metrics: MetricsBlock | None, baseline: tuple[str, float] | None, scale: Scale
) -> Figure | None:
    """Draw the validation score over steps.

    Args:
        metrics: the run's metrics; the figure marks the model that was kept.
        baseline: the score of always giving the same answer, drawn as a line: name and score.
        scale: the scale of the scores.
    """
    points = score_points(metrics)
    if metrics is None or not points:
        return None
    figure, (axes,) = subplots(2.6)
    steps = [step for step, _ in points]
    scores = [scale.times * score for _, score in points]
    axes.plot(steps, scores, marker="o", ms=4, color=colour(0), label="score")
    texts = [f"step {step:,}: {format_score(score, scale)}" for step, score in points]
    point_tips(axes, list(zip(steps, scores, strict=True)), texts)
    best = metrics.best
    if best and best.score is not None:
        kept = [scale.times * best.score]
        axes.plot([best.step], kept, "o", ms=10, mfc="none", mec=colour(1), label="best, kept")
    if baseline is not None:
        axes.axhline(scale.times * baseline[1], color=INK, lw=1, ls=":", label=baseline[0])
    axes.set(xlabel="optimizer step", ylabel=plain(scale.label))
    whole_steps(axes)
    few_ticks(axes.yaxis)
    grid(axes)
    return figure


@chart
def loss_curve(metrics: MetricsBlock | None) -> Figure | None:
    """Draw the training loss as logged and the validation loss at each evaluation."""
    metrics = metrics or MetricsBlock()
    training, validation = (
        [(one.step, one.loss) for one in found if one.loss is not None]
        for found in (metrics.train, metrics.history)
    )
    if not training and not validation:
        return None
    figure, (axes,) = subplots(2.6)
    if training:
        dots = "o" if len(training) == 1 else ""  # A line of one point is not visible.
        line = zip(*training, strict=True)
        axes.plot(*line, marker=dots, ms=3, lw=1, color=colour(0), label="training")
    if validation:
        line = zip(*validation, strict=True)
        axes.plot(*line, marker="o", ms=4, color=colour(1), label="validation")
    for name, points in (("training", training), ("validation", validation)):
        texts = [f"step {step:,}: {name} loss {format_number(loss)}" for step, loss in points]
        point_tips(axes, points, texts)
    axes.set(xlabel="optimizer step", ylabel="loss")
    whole_steps(axes)
    few_ticks(axes.yaxis)
    grid(axes)
    return figure


@chart
def memory_bars(
    bars: Sequence[tuple[str, MemoryCategories]], thickness: float = 0.34
) -> Figure | None:
    """Draw memory in MiB, stacked by category.

    Args:
        bars: (label, bytes) of every bar, from the top.
        thickness: inches per bar.
    """
    if not bars:
        return None
    layers = [
        (label, [getattr(categories, key) / MIB for _, categories in bars])
        for key, label in CATEGORIES.items()
    ]
    figure, (axes,) = subplots(0.6 + thickness * len(bars))
    stacked(axes, [label for label, _ in bars], layers, "MiB")
    axes.set_xlabel("MiB")
    return figure


@chart
def time_bar(times: Sequence[tuple[str, float]]) -> Figure | None:
    """Draw (phase, seconds) as one bar."""
    if not times:
        return None
    figure, (axes,) = subplots(1.0)
    stacked(axes, ["time"], [(label, [seconds]) for label, seconds in times], "s")
    axes.set(xlabel="seconds", yticks=[])
    return figure


@chart
def energy_bars(shares: Mapping[str, Mapping[str, float]]) -> Figure | None:
    """Draw the share of the squared gradient by layer kind.

    Args:
        shares: layer kind -> label -> share; a kind may lack labels.
    """
    labels = list(dict.fromkeys(label for found in shares.values() for label in found))
    if not labels:
        return None
    places = np.arange(len(shares))
    thickness = 0.8 / len(labels)
    figure, (axes,) = subplots(0.7 + 0.24 * len(labels) * len(shares))
    for at, label in enumerate(labels):
        lengths = [100 * found.get(label, 0.0) for found in shares.values()]
        rows = places - 0.4 + thickness * (at + 0.5)
        bars = axes.barh(rows, lengths, thickness * 0.9, color=colour(at), label=label)
        axes.bar_label(bars, fmt="%.0f", padding=2)
        for bar, kind, value in zip(bars, shares, lengths, strict=True):
            tip(bar, f"{kind}, {label}: {value:.1f} %")
    name_rows(axes, list(shares))
    axes.set(xlabel="% of squared gradient", xlim=(0, 108))
    few_ticks(axes.xaxis)
    grid(axes, "x")
    return figure


@chart
def spectra_lines(spectra: Sequence[Spectrum]) -> Figure | None:
    """Draw the singular values of the calibration gradients, output and input side."""
    found = [(one, [v for v in one.values if v is not None and v > 0]) for one in spectra]
    found = [(one, values) for one, values in found if len(values) > 1]
    if not found:
        return None
    keys = list(dict.fromkeys(one.key for one, _ in found))[:_MAX_SPECTRA]
    sides = list(dict.fromkeys(one.side for one, _ in found))
    figure, every = subplots(2.6, columns=len(sides))
    for axes, side in zip(every, sides, strict=True):
        for one, values in found:
            if one.side == side and one.key in keys:
                tint = colour(keys.index(one.key))
                directions = range(1, len(values) + 1)
                axes.plot(directions, values, lw=1.2, color=tint, label=plain(one.key))
        axes.set(title=f"{side} side", xlabel="direction", xscale="log", yscale="log")
        log_ticks(axes.xaxis)
        log_ticks(axes.yaxis)
        grid(axes, "both")
    every[0].set_ylabel("singular value / first")
    return figure


@chart
def gradient_maps(found: HeatMap | None) -> Figure | None:
    """Draw the gradient entries of one target module in the original basis and in its core."""
    original, core = (matrix_of(found.original), matrix_of(found.basis)) if found else (None, None)
    if original is None or core is None:
        return None
    highest = float(max(original.max(), core.max()))
    if highest <= 0:
        return None
    figure, every = subplots(2.5, columns=2)
    floored = [np.maximum(matrix, 1e-9 * highest) for matrix in (original, core)]
    limits = (_DARKEST * highest, highest)
    heat_maps(figure, floored, "mean |entry|", limits, logarithmic=True)
    axes_of = (
        ("original basis", "input feature", "output feature"),
        ("calibrated basis", "input direction", "output direction"),
    )
    for axes, (title, across, down) in zip(every, axes_of, strict=True):
        axes.set(title=title, xlabel=across, ylabel=down)
    return figure


def sparsity_map(found: SparsityBlock | None) -> Drawing | None:
    """Draw the share of changed parameters in each block of the middle target module's matrix."""
    return sparsity_maps([("", found)] if found else [], height=2.6)


@chart
def sparsity_maps(
    found: Sequence[tuple[str, SparsityBlock]], *, height: float, columns: int = 1, rows: int = 1
) -> Figure | None:
    """Draw one map per (title, block), in one colour scale; None if one of them is damaged."""
    shares = [matrix_of(block.map) for _, block in found]
    maps = [100 * share for share in shares if share is not None]
    if not maps or len(maps) < len(shares):
        return None
    figure, every = subplots(height, columns, rows)
    highest = max(float(each.max()) for each in maps) or 1.0
    heat_maps(figure, maps, "% of the block changed", (0.0, highest), logarithmic=False)
    for axes, (title, block) in zip(every, found, strict=False):
        axes.set(title=plain(short(title)))
        axes.set(xlabel=f"column (of {block.columns:,})", ylabel=f"row (of {block.rows:,})")
    return figure


def matrix_of(rows: Sequence[Sequence[float | None]]) -> np.ndarray | None:
    """Return absolute values as an array (rows, columns); None for an empty or ragged matrix."""
    if len({len(row) for row in rows}) != 1 or not rows[0]:
        return None
    return np.abs(np.nan_to_num(np.array(rows, dtype=np.float64)))
