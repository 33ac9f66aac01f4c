"""Draw the figures of one run. Each function returns SVG, or None without data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
    Canvas,
    colour,
    grid,
    legend,
    plain,
    stacked,
    whole_steps,
)
from sparsegrad_cli.report.units import (
    CATEGORIES,
    MIB,
)

_MAX_SPECTRA = 12
_DARKEST = 1e-4  # Darkest value of a heat map, as a share of the largest entry.

Points = list[tuple[int, float]]


def score_points(metrics: MetricsBlock | None) -> Points:
    """Return (step, score) of every evaluation, including the one before training."""
    if metrics is None:
        return []
    every = [*([metrics.initial] if metrics.initial else []), *metrics.history]
    return list({one.step: one.score for one in every if one.score is not None}.items())


def learning_curve(
    metrics: MetricsBlock | None, majority: float | None, scale: Scale
) -> str | None:
    """Draw the validation score over steps.

    Args:
        metrics: the run's metrics; the figure marks the model that was kept.
        majority: the score of always predicting the most frequent class, drawn as a line.
        scale: the scale of the scores.
    """
    points = score_points(metrics)
    if metrics is None or not points:
        return None
    with Canvas(3.0) as canvas:
        axes = canvas.axes
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
    return canvas.svg()


def loss_curve(metrics: MetricsBlock | None) -> str | None:
    """Draw the training loss as logged and the validation loss at each evaluation."""
    metrics = metrics or MetricsBlock()
    training, validation = (
        [(one.step, one.loss) for one in found if one.loss is not None]
        for found in (metrics.train, metrics.history)
    )
    if not training and not validation:
        return None
    with Canvas(2.7) as canvas:
        axes = canvas.axes
        if training:
            axes.plot(*zip(*training, strict=True), lw=1, color=colour(0), label="training")
        if validation:
            line = zip(*validation, strict=True)
            axes.plot(*line, marker="o", ms=4, color=colour(1), label="validation")
        axes.set(xlabel="optimizer step", ylabel="loss")
        whole_steps(axes)
        grid(axes)
        legend(axes)
    return canvas.svg()


def memory_bars(
    bars: Sequence[tuple[str, MemoryCategories]], thickness: float = 0.34
) -> str | None:
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
    with Canvas(0.9 + thickness * len(bars)) as canvas:
        stacked(canvas.axes, [label for label, _ in bars], layers)
        canvas.axes.set_xlabel("MiB")
        legend(canvas.axes)
    return canvas.svg()


def time_bar(times: Sequence[tuple[str, float]]) -> str | None:
    """Draw (phase, seconds) as one bar."""
    if not times:
        return None
    with Canvas(1.35) as canvas:
        stacked(canvas.axes, ["time"], [(label, [seconds]) for label, seconds in times])
        canvas.axes.set(xlabel="seconds", yticks=[])
        legend(canvas.axes, columns=2 if len(times) > 3 else 1)
    return canvas.svg()


def energy_bars(shares: Mapping[str, Mapping[str, float]]) -> str | None:
    """Draw the share of the squared gradient by layer kind.

    Args:
        shares: layer kind -> label -> share; a kind may lack labels.
    """
    labels = list(dict.fromkeys(label for found in shares.values() for label in found))
    if not labels:
        return None
    places = np.arange(len(shares))
    width = 0.8 / len(labels)
    with Canvas(2.8) as canvas:
        axes = canvas.axes
        for at, label in enumerate(labels):
            heights = [100 * found.get(label, 0.0) for found in shares.values()]
            bars = axes.bar(
                places + width * at, heights, width * 0.92, color=colour(at), label=label
            )
            axes.bar_label(bars, fmt="%.0f", fontsize=8, padding=1)
        axes.set_xticks(places + 0.4 - width / 2, [plain(kind) for kind in shares])
        axes.set(ylabel="% of squared gradient", ylim=(0, 108))
        grid(axes)
        legend(axes)
    return canvas.svg()


def spectra_lines(spectra: Sequence[Spectrum]) -> str | None:
    """Draw the singular values of the calibration gradients, output and input side."""
    found = [(one, [v for v in one.values if v is not None and v > 0]) for one in spectra]
    found = [(one, values) for one, values in found if len(values) > 1]
    if not found:
        return None
    keys = list(dict.fromkeys(one.key for one, _ in found))[:_MAX_SPECTRA]
    sides = list(dict.fromkeys(one.side for one, _ in found))
    with Canvas(3.0, columns=len(sides)) as canvas:
        for axes, side in zip(canvas.all_axes, sides, strict=True):
            for one, values in found:
                if one.side == side and one.key in keys:
                    tint = colour(keys.index(one.key))
                    directions = range(1, len(values) + 1)
                    axes.plot(directions, values, lw=1.2, color=tint, label=plain(one.key))
            axes.set(title=f"{side} side", xlabel="direction", xscale="log", yscale="log")
            grid(axes, "both")
        canvas.axes.set_ylabel("singular value / first")
        legend(canvas.all_axes[-1])
    return canvas.svg()


def gradient_maps(found: HeatMap | None) -> str | None:
    """Draw the gradient entries of one target module in the original basis and in its core."""
    original, core = (matrix_of(found.original), matrix_of(found.basis)) if found else (None, None)
    if original is None or core is None:
        return None
    highest = float(max(original.max(), core.max()))
    if highest <= 0:
        return None
    with Canvas(3.4, columns=2) as canvas:
        floored = [np.maximum(matrix, 1e-9 * highest) for matrix in (original, core)]
        limits = (_DARKEST * highest, highest)
        canvas.heat_maps(floored, "mean |entry|", limits, logarithmic=True)
        titles = ("gradient, original basis", "core gradient, calibrated basis")
        for axes, title in zip(canvas.all_axes, titles, strict=True):
            axes.set(title=title, xlabel="input direction")
        canvas.axes.set_ylabel("output direction")
    return canvas.svg()


def sparsity_map(found: SparsityBlock | None) -> str | None:
    """Draw the share of changed parameters in each block of the middle target module's matrix."""
    return sparsity_maps([("", found)], Canvas(3.2)) if found else None


def sparsity_maps(found: Sequence[tuple[str, SparsityBlock]], canvas: Canvas) -> str | None:
    """Draw one map per (title, block), in one colour scale."""
    shares = [matrix_of(block.map) for _, block in found]
    maps = [100 * share for share in shares if share is not None]
    if not maps or len(maps) < len(shares):
        return None
    with canvas:
        highest = max(float(each.max()) for each in maps) or 1.0
        canvas.heat_maps(maps, "% of the block changed", (0.0, highest), logarithmic=False)
        for axes, (title, block) in zip(canvas.all_axes, found, strict=False):
            axes.set(title=plain(title), xlabel=f"{block.rows:,} × {block.columns:,}")
    return canvas.svg()


def matrix_of(rows: Sequence[Sequence[float | None]]) -> np.ndarray | None:
    """Return absolute values as an array (rows, columns); None for an empty or ragged matrix."""
    if len({len(row) for row in rows}) != 1 or not rows[0]:
        return None
    return np.abs(np.nan_to_num(np.array(rows, dtype=np.float64)))
