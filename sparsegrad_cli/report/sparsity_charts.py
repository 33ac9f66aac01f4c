"""Where methods train, drawn: which entries of a matrix, and which share of every target."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.colors import LogNorm, Normalize

from sparsegrad_cli.report.access import block, mappings, number, text
from sparsegrad_cli.report.columns import method_name
from sparsegrad_cli.report.compare_record import Row, cells_of, rows_of
from sparsegrad_cli.report.run_charts import matrix_of
from sparsegrad_cli.report.svg import Canvas, plain

_MOST_MAPS = 8
_ACROSS = 4


def sparsity_map(run: Any) -> str | None:
    """One run: the share of each block of the middle target's matrix that was touched."""
    found = _map(run)
    if found is None:
        return None
    with Canvas(4.6, 3.2) as canvas:
        _draw(canvas, [("", found)])
    return canvas.svg()


def sparsity_maps(compare: Any, task: str) -> str | None:
    """One small map a method, of its first seed."""
    shown: list[tuple[str, Any]] = []
    for row in rows_of(compare, task):
        found = next((m for run in _runs(compare, task, row) if (m := _map(run)) is not None), None)
        if found is not None and len(shown) < _MOST_MAPS:
            shown.append((method_name(row), found))
    if not shown:
        return None
    across = min(_ACROSS, len(shown))
    down = -(-len(shown) // across)
    with Canvas(7.2, 2.1 * down + 0.3, columns=across, rows=down) as canvas:
        _draw(canvas, shown)
    return canvas.svg()


def _runs(compare: Any, task: str, row: Row) -> list[Any]:
    return [cell.get("run") for cell in cells_of(compare, task, method_name(row))]


def _map(run: Any) -> Any:
    """(title, shares) of a run's sparsity block, or None."""
    there = block(run, "sparsity")
    shares = matrix_of(there.get("map"))
    if shares is None:
        return None
    rows, columns = number(there, "rows"), number(there, "columns")
    size = f"{rows:,.0f} × {columns:,.0f}" if rows is not None and columns is not None else ""
    return size, shares


def _draw(canvas: Canvas, shown: list[tuple[str, Any]]) -> None:
    highest = max(float(shares.max()) for _, (_, shares) in shown)
    scale = Normalize(0.0, 100.0 * highest or 1.0)
    for axes, (name, (size, shares)) in zip(canvas.all_axes, shown, strict=False):
        image = axes.imshow(100.0 * shares, norm=scale, cmap="viridis", aspect="auto")
        axes.set(title=plain(name), xticks=[], yticks=[], xlabel=size)
    for axes in canvas.all_axes[len(shown) :]:
        axes.set_visible(False)
    bar = canvas.figure.colorbar(image, ax=canvas.all_axes, shrink=0.9)
    bar.set_label("% of the block touched")


def touched_by_target(compare: Any, task: str) -> str | None:
    """Methods by targets: entries ever touched, as a share of the target's weights."""
    names: list[str] = []
    rows: list[tuple[str, dict[str, float]]] = []
    for row in rows_of(compare, task):
        for run in _runs(compare, task, row):
            shares = _shares(run)
            if shares:
                names += [name for name in shares if name not in names]
                rows.append((method_name(row), shares))
                break
    if not rows or len(names) < 2:
        return None
    grid = np.array([[100.0 * shares.get(name, np.nan) for name in names] for _, shares in rows])
    positive = grid[np.isfinite(grid) & (grid > 0)]
    if not positive.size:
        return None
    low, high = float(positive.min()), float(positive.max())
    with Canvas(7.2, 1.2 + 0.28 * len(rows)) as canvas:
        axes = canvas.axes
        scale = LogNorm(0.9 * low, 1.1 * high)
        image = axes.imshow(grid, norm=scale, cmap="viridis", aspect="auto")
        axes.set_yticks(range(len(rows)), [plain(name) for name, _ in rows])
        axes.tick_params(length=0)
        axes.set(xticks=[], xlabel=f"{len(names)} targets, in the model's order")
        bar = canvas.figure.colorbar(image, ax=axes)
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        bar.ax.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
        bar.set_label("% touched")
    return canvas.svg()


def _shares(run: Any) -> dict[str, float]:
    found = {}
    for target in mappings(run, "counts", "targets"):
        touched, name = number(target, "touched"), text(target, "name")
        size = (number(target, "out_features") or 0) * (number(target, "in_features") or 0)
        if touched is not None and name and size:
            found[name] = touched / size
    return found
