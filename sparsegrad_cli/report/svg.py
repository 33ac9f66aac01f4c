"""Figures as SVG that stands inside a page: its text and grid take the page's colours.

Matplotlib draws into ``Figure`` objects; no pyplot, no window system, no global state. Equal
figures give equal bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Legible on white and on near-black, and told apart by readers who do not see red or green.
COLOURS = ("#3a86c8", "#e08214", "#2a9d7f", "#c7548f", "#8468c9", "#a8931a", "#7f8790")
MARKERS = "osD^vPX"
# Stand-ins that nothing else uses: in the SVG they become the page's own colours.
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


class Canvas:
    """One figure being drawn: ``with Canvas(7, 3) as canvas: ...`` then ``canvas.svg()``.

    Args:
        width, height: inches.
        columns: axes side by side.
        rows: rows of axes; ``all_axes`` goes through them one after the other.
    """

    def __init__(self, width: float, height: float, columns: int = 1, rows: int = 1) -> None:
        self._context = matplotlib.rc_context(_SETTINGS)
        self._size = (width, height)
        self._columns, self._rows = columns, rows
        self._svg = ""

    def __enter__(self) -> Canvas:
        self._context.__enter__()
        self.figure = Figure(figsize=self._size, layout="constrained")
        found = self.figure.subplots(self._rows, self._columns, squeeze=False)
        self.all_axes: list[Axes] = list(found.flat)
        self.axes = self.all_axes[0]
        for axes in self.all_axes:
            axes.patch.set_alpha(0)
            axes.spines[["top", "right"]].set_visible(False)
        return self

    def __exit__(self, *error: object) -> None:
        try:
            if error[0] is None:
                self._svg = _draw(self.figure)
        finally:
            self._context.__exit__(None, None, None)

    def svg(self) -> str:
        """The SVG element, to stand inside HTML."""
        return self._svg


def grid(axes: Axes, axis: str = "y") -> None:
    """Faint lines behind the data."""
    axes.grid(axis=axis, color=GRID, linewidth=0.7)  # type: ignore[arg-type]
    axes.set_axisbelow(True)


def whole_steps(axes: Axes) -> None:
    """Ticks of an axis of steps: whole numbers with separators."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def height_for(least: float, labels: int) -> float:
    """Inches that a figure needs for a legend of so many lines beside its data."""
    return max(least, 0.5 + 0.185 * labels)


def legend(axes: Axes, columns: int = 1) -> None:
    """A legend beside the data, where there is more than one thing to tell apart."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        axes.legend(handles, labels, loc="upper left", bbox_to_anchor=(1.0, 1.0), ncols=columns)


def name_ticks(axes: Axes, names: Sequence[str]) -> None:
    """Names below an axis, tilted where they would run into each other."""
    shown = [plain(name) for name in names]
    tilted = sum(map(len, shown)) > 60
    axes.set_xticks(range(len(names)), shown)
    if tilted:
        axes.tick_params(axis="x", labelrotation=30)
        for label in axes.get_xticklabels():
            label.set_horizontalalignment("right")


def plain(label: str) -> str:
    """Text that matplotlib neither reads as mathematics nor leaves out of a legend."""
    shown = label.replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def colour(number: int) -> str:
    """The colour of the n-th thing."""
    return COLOURS[number % len(COLOURS)]


def marker(number: int) -> str:
    """The marker of the n-th thing: another where colours begin again."""
    return MARKERS[number // len(COLOURS) % len(MARKERS)]


def stacked(
    axes: Axes, names: Sequence[str], layers: Sequence[tuple[str, Sequence[float]]]
) -> None:
    """Horizontal stacked bars: one bar a name, one layer a (label, values) that is not all zero."""
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


def _draw(figure: Figure) -> str:
    figure.patch.set_alpha(0)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    raw = buffer.getvalue().decode()
    raw = raw[raw.index("<svg") :]
    for stand_in, page in _PAGE.items():
        raw = raw.replace(stand_in, page)
    raw = re.sub(r"\s*<metadata>.*?</metadata>", "", raw, flags=re.DOTALL)
    # Several figures share a page: an id that nothing refers to would only be there twice.
    used = set(re.findall(r"#([A-Za-z][\w.-]*)", raw))
    raw = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", raw)
    # The page sets the width; the drawing keeps its proportions.
    return re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", raw, count=1).strip()
