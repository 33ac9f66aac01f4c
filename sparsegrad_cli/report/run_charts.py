"""The figures of one run. Each function gives SVG, or None where the record has nothing to draw."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm

from sparsegrad_cli.records.metric_direction import scale_of
from sparsegrad_cli.report.access import block, dig, items, mappings, number, numbers, points, text
from sparsegrad_cli.report.labels import CATEGORIES, ENERGY, SUPPORT_ENERGY
from sparsegrad_cli.report.record_tables import energy_columns, kind_means, support_means
from sparsegrad_cli.report.run_tables import memory_phases, scale_of_run, times
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

MIB = 1024 * 1024
_MOST_SPECTRA = 12


def score_points(run: Any) -> list[tuple[float, float]]:
    """(step, score as it is printed) of every evaluation, the one before training included."""
    times = scale_of(text(run, "task", "metric")).times
    first = points([dig(run, "metrics", "initial")], "step", "score")
    history = points(items(run, "metrics", "history"), "step", "score")
    return [(step, times * score) for step, score in dict([*first, *history]).items()]


def learning_curve(run: Any) -> str | None:
    """Validation score over steps, the kept model marked, the majority class as a line."""
    found, scale = score_points(run), scale_of_run(run)
    if not found:
        return None
    with Canvas(7.2, 3.0) as canvas:
        axes = canvas.axes
        axes.plot(*zip(*found, strict=True), marker="o", ms=4, color=colour(0), label="score")
        best = points([dig(run, "metrics", "best")], "step", "score")
        for step, score in best:
            kept = scale.times * score
            axes.plot([step], [kept], "o", ms=10, mfc="none", mec=colour(1), label="best, kept")
        majority = number(run, "task", "majority_score")
        if majority is not None:
            axes.axhline(scale.times * majority, color=INK, lw=1, ls=":", label="majority class")
        axes.set(xlabel="optimizer step", ylabel=plain(scale.label))
        whole_steps(axes)
        grid(axes)
        legend(axes)
    return canvas.svg()


def loss_curve(run: Any) -> str | None:
    """Training loss as logged, validation loss at each evaluation."""
    train = points(items(run, "metrics", "train"), "step", "loss")
    held_out = points(items(run, "metrics", "history"), "step", "loss")
    if not train and not held_out:
        return None
    with Canvas(7.2, 2.7) as canvas:
        axes = canvas.axes
        if train:
            axes.plot(*zip(*train, strict=True), lw=1, color=colour(0), label="training")
        if held_out:
            axes.plot(
                *zip(*held_out, strict=True), marker="o", ms=4, color=colour(1), label="validation"
            )
        axes.set(xlabel="optimizer step", ylabel="loss")
        whole_steps(axes)
        grid(axes)
        legend(axes)
    return canvas.svg()


def memory_bars(run: Any) -> str | None:
    """The peak of each phase, stacked by category, MiB."""
    phases = memory_phases(run)
    if not phases:
        return None
    layers = [
        (label, [(number(there, "categories", key) or 0.0) / MIB for _, there in phases])
        for key, label in CATEGORIES.items()
    ]
    with Canvas(7.2, 0.9 + 0.34 * len(phases)) as canvas:
        stacked(canvas.axes, [name for name, _ in phases], layers)
        canvas.axes.set_xlabel("MiB")
        legend(canvas.axes)
    return canvas.svg()


def time_bar(run: Any) -> str | None:
    """Seconds by phase, one bar."""
    found = times(run)
    if not found:
        return None
    with Canvas(7.2, 1.35) as canvas:
        stacked(canvas.axes, ["time"], [(label, [seconds]) for label, seconds in found])
        canvas.axes.set(xlabel="seconds", yticks=[])
        legend(canvas.axes, columns=2 if len(found) > 3 else 1)
    return canvas.svg()


def energy_bars(run: Any) -> str | None:
    """Share of the squared gradient in a number of entries, by layer kind and choice."""
    means: Mapping[str, Any] = support_means(run)
    words, columns = SUPPORT_ENERGY, list(SUPPORT_ENERGY)
    if not means:
        words, columns, means = ENERGY, energy_columns(run), kind_means(run)
    if not columns or not means:
        return None
    places = np.arange(len(means))
    width = 0.8 / len(columns)
    with Canvas(7.2, 2.8) as canvas:
        axes = canvas.axes
        for at, column in enumerate(columns):
            shares = [100 * (number(row, column) or 0.0) for row in means.values()]
            bars = axes.bar(
                places + width * at, shares, width * 0.92, color=colour(at), label=words[column]
            )
            axes.bar_label(bars, fmt="%.0f", fontsize=8, padding=1)
        axes.set_xticks(places + 0.4 - width / 2, [plain(kind) for kind in means])
        axes.set(ylabel="% of squared gradient", ylim=(0, 108))
        grid(axes)
        legend(axes)
    return canvas.svg()


def spectra_lines(run: Any) -> str | None:
    """Singular values of the calibration gradients, output and input side, divided by the first."""
    found = [
        (text(item, "key") or "?", text(item, "side") or "?", numbers(item, "values"))
        for item in mappings(run, "calibration", "spectra")
    ]
    found = [item for item in found if len(item[2]) > 1]
    if not found:
        return None
    keys = list(dict.fromkeys(key for key, _, _ in found))[:_MOST_SPECTRA]
    sides = list(dict.fromkeys(side for _, side, _ in found))
    with Canvas(7.2, 3.0, columns=len(sides)) as canvas:
        for axes, side in zip(canvas.all_axes, sides, strict=True):
            for key, its, values in found:
                if its == side and key in keys:
                    kept = [value for value in values if value > 0]
                    label = plain(key)
                    axes.plot(
                        range(1, len(kept) + 1),
                        kept,
                        lw=1.2,
                        color=colour(keys.index(key)),
                        label=label,
                    )
            axes.set(title=f"{plain(side)} side", xlabel="direction", xscale="log", yscale="log")
            grid(axes, "both")
        canvas.axes.set_ylabel("singular value / first")
        legend(canvas.all_axes[-1])
    return canvas.svg()


def heat_maps(run: Any) -> str | None:
    """One target's gradient, entry by entry: in the original basis and as its core."""
    there = block(run, "calibration", "heat_map")
    maps = [(title, matrix_of(there.get(key))) for key, title in _MAPS]
    drawn = [(title, matrix) for title, matrix in maps if matrix is not None]
    if not drawn:
        return None
    highest = max(float(matrix.max()) for _, matrix in drawn)
    if highest <= 0:
        return None
    scale = LogNorm(vmin=highest * 1e-4, vmax=highest, clip=True)
    with Canvas(7.2, 3.4, columns=len(drawn)) as canvas:
        for axes, (title, matrix) in zip(canvas.all_axes, drawn, strict=True):
            image = axes.imshow(
                np.maximum(matrix, highest * 1e-9), norm=scale, cmap="viridis", aspect="auto"
            )
            axes.set(title=title, xticks=[], yticks=[], xlabel="input direction")
        canvas.axes.set_ylabel("output direction")
        bar = canvas.figure.colorbar(image, ax=canvas.all_axes, shrink=0.9)
        bar.set_label("mean |entry|")
    return canvas.svg()


_MAPS = (("original", "gradient, original basis"), ("basis", "core gradient, calibrated basis"))


def matrix_of(rows: Any) -> Any:
    """A rectangle of finite numbers as an array, or None."""
    if not isinstance(rows, list) or not rows:
        return None
    read = [numbers(row) if isinstance(row, list) else [] for row in rows]
    widths = {len(row) for row in read}
    return np.abs(np.array(read)) if len(widths) == 1 and widths != {0} else None
