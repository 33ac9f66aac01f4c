"""Draw figures as inline SVG, in which text and grid take the colours of the page.

Matplotlib draws into ``Figure`` objects, without pyplot, a window system or global state. Equal
figures give equal bytes. Matplotlib is imported when the first figure is drawn.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, ParamSpec

import numpy as np

from sparsegrad_cli.io.untrusted_text import printable_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar
    from matplotlib.figure import Figure

# Legible on white and near-black, and distinguishable for colour-blind readers.
COLOURS = ("#3a86c8", "#e08214", "#2a9d7f", "#c7548f", "#8468c9", "#a8931a", "#7f8790")
MARKERS = "osD^vPX"
# Unique placeholder colours, which the SVG replaces by the page's own colours.
INK, GRID = "#010203", "#040506"
_PAGE = {INK: "currentColor", GRID: "var(--grid)"}
_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sparsegrad",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.0,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
}
_WIDTH = 7.2  # Inches.
P = ParamSpec("P")


def chart(draw: Callable[P, Figure | None]) -> Callable[P, str | None]:
    """Make a function that builds a figure return it as SVG, in the style of the reports."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> str | None:
        import matplotlib

        with matplotlib.rc_context(_SETTINGS):
            figure = draw(*args, **kwargs)
            return None if figure is None else to_svg(figure)

    return drawn


def subplots(height: float, columns: int = 1, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """Return a figure of ``height`` inches, and its axes row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    every: list[Axes] = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in every:
        axes.patch.set_alpha(0)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, every


def heat_maps(
    figure: Figure,
    matrices: Sequence[np.ndarray],
    label: str,
    limits: tuple[float, float],
    *,
    logarithmic: bool,
) -> Colorbar:
    """Draw matrices on the first axes, in one colour scale with a bar next to them.

    Args:
        figure: the figure; axes without a matrix are hidden.
        matrices: (rows, columns) each; NaN is left blank.
        label: the label of the colour bar.
        limits: the values of the darkest and the brightest colour.
        logarithmic: whether the scale is logarithmic.

    Returns:
        The colour bar.
    """
    from matplotlib.colors import LogNorm, Normalize

    norm = LogNorm(*limits, clip=True) if logarithmic else Normalize(*limits)
    every = list(figure.axes)
    for axes, matrix in zip(every, matrices, strict=False):
        image = axes.imshow(matrix, norm=norm, cmap="viridis", aspect="auto")
        axes.set(xticks=[], yticks=[])
    for axes in every[len(matrices) :]:
        axes.set_visible(False)
    bar = figure.colorbar(image, ax=every, shrink=0.9)
    bar.set_label(label)
    return bar


def grid(axes: Axes, axis: str = "y") -> None:
    """Draw faint lines behind the data."""
    axes.grid(axis=axis, color=GRID, linewidth=0.7)  # type: ignore[arg-type]
    axes.set_axisbelow(True)


def whole_steps(axes: Axes) -> None:
    """Set the ticks of an axis of steps: whole numbers with separators."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def height_for(least: float, labels: int) -> float:
    """Return the height in inches that fits a legend of ``labels`` lines next to the data."""
    return max(least, 0.5 + 0.185 * labels)


def legend(axes: Axes, columns: int = 1) -> None:
    """Draw a legend next to the data, if any series has a label."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        axes.legend(handles, labels, loc="upper left", bbox_to_anchor=(1.0, 1.0), ncols=columns)


def name_ticks(axes: Axes, names: Sequence[str]) -> None:
    """Write names below an axis, tilted if they would overlap."""
    shown = [plain(name) for name in names]
    tilted = sum(map(len, shown)) > 60
    axes.set_xticks(range(len(names)), shown)
    if tilted:
        axes.tick_params(axis="x", labelrotation=30)
        for label in axes.get_xticklabels():
            label.set_horizontalalignment("right")


def plain(label: str) -> str:
    """Escape text that matplotlib would read as mathematics or leave out of a legend."""
    shown = printable_line(label).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def colour(number: int) -> str:
    """Return the colour of the n-th series."""
    return COLOURS[number % len(COLOURS)]


def marker(number: int) -> str:
    """Return the marker of the n-th series, which changes when the colours repeat."""
    return MARKERS[number // len(COLOURS) % len(MARKERS)]


def stacked(
    axes: Axes, names: Sequence[str], layers: Sequence[tuple[str, Sequence[float]]]
) -> None:
    """Draw horizontal stacked bars with a legend.

    Args:
        axes: the axes to draw on.
        names: one name per bar, from the top.
        layers: (label, one value per bar); layers of zeros are left out.
    """
    places = range(len(names))
    left = [0.0] * len(names)
    for number, (label, values) in enumerate(layers):
        if any(values):
            axes.barh(
                places, values, left=left, height=0.62, color=colour(number), label=plain(label)
            )
        left = [start + value for start, value in zip(left, values, strict=True)]
    axes.set_yticks(list(places), [plain(name) for name in names])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    grid(axes, "x")


def to_svg(figure: Figure) -> str:
    """Return a figure as an SVG element that takes the colours of the page around it."""
    figure.patch.set_alpha(0)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    raw = buffer.getvalue().decode()
    raw = raw[raw.index("<svg") :]
    for placeholder, page in _PAGE.items():
        raw = raw.replace(placeholder, page)
    raw = re.sub(r"\s*<metadata>.*?</metadata>", "", raw, flags=re.DOTALL)
    # Several figures share a page, so unused ids would be duplicates.
    used = set(re.findall(r"#([A-Za-z][\w.-]*)", raw))
    raw = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", raw)
    # The page sets the width; the drawing keeps its proportions.
    return re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", raw, count=1).strip()
