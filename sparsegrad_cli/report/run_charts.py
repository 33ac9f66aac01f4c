"""Draw the figures of one run. Each function returns SVG, or None without data."""

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
from sparsegrad_cli.report.svg import (
    INK,
    chart,
    colour,
    grid,
    heat_maps,
    legend,
    plain,
    stacked,
    subplots,
    whole_steps,
)
from sparsegrad_cli.report.units import CATEGORIES, MIB

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
    metrics: MetricsBlock | None, majority: float | None, scale: Scale
) -> Figure | None:
    """Draw the validation score over steps.

    Args:
        metrics: the run's metrics; the figure marks the model that was kept.
        majority: the score of always predicting the most frequent class, drawn as a line.
        scale: the scale of the scores.
    """
    points = score_points(metrics)
    if metrics is None or not points:
        return None
    figure, (axes,) = subplots(3.0)
    steps = [step for step, _ in points]
    scores = [scale.times * score for _, score in points]
    axes.plot(steps, scores, marker="o", ms=4, color=colour(0), label="score")
    best = metrics.best
    if best and best.score is not None:
        kept = [scale.times * best.score]
        axes.plot([best.step], kept, "o", ms=10, mfc="none", mec=colour(1), label="best, kept")
    if majority is not None:
        axes.axhline(scale.times * majority, color=INK, lw=1, ls=":", label="majority class")
    axes.set(xlabel="optimizer step", ylabel=plain(scale.label))
    whole_steps(axes)
    grid(axes)
    legend(axes)
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
    figure, (axes,) = subplots(2.7)
    if training:
        axes.plot(*zip(*training, strict=True), lw=1, color=colour(0), label="training")
    if validation:
        line = zip(*validation, strict=True)
        axes.plot(*line, marker="o", ms=4, color=colour(1), label="validation")
    axes.set(xlabel="optimizer step", ylabel="loss")
    whole_steps(axes)
    grid(axes)
    legend(axes)
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
    figure, (axes,) = subplots(0.9 + thickness * len(bars))
    stacked(axes, [label for label, _ in bars], layers)
    axes.set_xlabel("MiB")
    legend(axes)
    return figure


@chart
def time_bar(times: Sequence[tuple[str, float]]) -> Figure | None:
    """Draw (phase, seconds) as one bar."""
    if not times:
        return None
    figure, (axes,) = subplots(1.35)
    stacked(axes, ["time"], [(label, [seconds]) for label, seconds in times])
    axes.set(xlabel="seconds", yticks=[])
    legend(axes, columns=2 if len(times) > 3 else 1)
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
    width = 0.8 / len(labels)
    figure, (axes,) = subplots(2.8)
    for at, label in enumerate(labels):
        heights = [100 * found.get(label, 0.0) for found in shares.values()]
        bars = axes.bar(places + width * at, heights, width * 0.92, color=colour(at), label=label)
        axes.bar_label(bars, fmt="%.0f", fontsize=8, padding=1)
    axes.set_xticks(places + 0.4 - width / 2, [plain(kind) for kind in shares])
    axes.set(ylabel="% of squared gradient", ylim=(0, 108))
    grid(axes)
    legend(axes)
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
    figure, every = subplots(3.0, columns=len(sides))
    for axes, side in zip(every, sides, strict=True):
        for one, values in found:
            if one.side == side and one.key in keys:
                tint = colour(keys.index(one.key))
                directions = range(1, len(values) + 1)
                axes.plot(directions, values, lw=1.2, color=tint, label=plain(one.key))
        axes.set(title=f"{side} side", xlabel="direction", xscale="log", yscale="log")
        grid(axes, "both")
    every[0].set_ylabel("singular value / first")
    legend(every[-1])
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
    figure, every = subplots(3.4, columns=2)
    floored = [np.maximum(matrix, 1e-9 * highest) for matrix in (original, core)]
    limits = (_DARKEST * highest, highest)
    heat_maps(figure, floored, "mean |entry|", limits, logarithmic=True)
    titles = ("gradient, original basis", "core gradient, calibrated basis")
    for axes, title in zip(every, titles, strict=True):
        axes.set(title=title, xlabel="input direction")
    every[0].set_ylabel("output direction")
    return figure


def sparsity_map(found: SparsityBlock | None) -> str | None:
    """Draw the share of changed parameters in each block of the middle target module's matrix."""
    return sparsity_maps([("", found)] if found else [], height=3.2)


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
        axes.set(title=plain(title), xlabel=f"{block.rows:,} × {block.columns:,}")
    return figure


def matrix_of(rows: Sequence[Sequence[float | None]]) -> np.ndarray | None:
    """Return absolute values as an array (rows, columns); None for an empty or ragged matrix."""
    if len({len(row) for row in rows}) != 1 or not rows[0]:
        return None
    return np.abs(np.nan_to_num(np.array(rows, dtype=np.float64)))
