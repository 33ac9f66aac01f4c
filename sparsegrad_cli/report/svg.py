"""Draw figures as inline SVG, in which text and grid take the colours of the page.

Matplotlib draws into ``Figure`` objects, without pyplot, a window system or global state. Equal
figures give equal bytes. Matplotlib is imported when the first figure is drawn. The page shows
titles and legends itself, because only HTML wraps them on a narrow screen.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np

from sparsegrad_cli.io.untrusted_text import printable_line
from sparsegrad_cli.report.document import Drawing, Key

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
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
    "lines.linewidth": 1.6,
}
_WIDTH = 5.6  # Inches. Drawings are 403 units wide, so text is legible on a phone.
_TIP = "tip:"  # Marks the id of an artist as the text of its tooltip.
_MAX_TIPS = 40  # Points of a line with a tooltip.
_LONGEST_NAME = 26  # Characters of a name beside an axis.
P = ParamSpec("P")


def chart(draw: Callable[P, Figure | None]) -> Callable[P, Drawing | None]:
    """Make a function that builds a figure return it as a drawing, in the style of the reports.

    The labels of the series become the legend.
    """

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Drawing | None:
        import matplotlib

        with matplotlib.rc_context(_SETTINGS):
            figure = draw(*args, **kwargs)
            return None if figure is None else Drawing(to_svg(figure), legend(figure))

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
        tip(image, f"{label}: {np.nanmin(matrix):.3g} to {np.nanmax(matrix):.3g}")
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

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def legend(figure: Figure) -> tuple[Key, ...]:
    """Return one key per label of the figure's series, in the order in which they were drawn."""
    keys: dict[str, Key] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            name = label.strip().replace(r"\$", "$")
            keys.setdefault(name, Key(name, _swatch(handle)))
    return tuple(keys.values())


def _swatch(handle: Any) -> str:
    """Return a small SVG that shows a line, a marker or a filled box as the figure draws it."""
    from matplotlib.colors import to_hex
    from matplotlib.lines import Line2D

    if not isinstance(handle, Line2D):  # A container of bars.
        parts = f'<rect x="3" y="1" width="12" height="10" fill="{to_hex(handle[0].get_fc())}"/>'
        return _in_svg(parts)
    tint, parts = to_hex(handle.get_color()), ""
    if handle.get_linestyle() != "None":
        dashes = {":": "2 2", "--": "5 3"}.get(str(handle.get_linestyle()))
        dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
        parts += f'<path d="M0 6H18" stroke="{tint}" stroke-width="2"{dashed}/>'
    shape = _marker_path(handle.get_marker())
    if shape:
        hollow = handle.get_markerfacecolor() == "none"
        edge = to_hex(handle.get_markeredgecolor())
        fill = "none" if hollow else to_hex(handle.get_markerfacecolor())
        parts += f'<path d="{shape}" fill="{fill}" stroke="{edge}" stroke-width="1.4"/>'
    return _in_svg(parts)


def _in_svg(parts: str) -> str:
    for placeholder, page in _PAGE.items():
        parts = parts.replace(placeholder, page)
    return f'<svg viewBox="0 0 18 12" width="18" height="12" aria-hidden="true">{parts}</svg>'


def _marker_path(name: object) -> str:
    """Return a marker as the path of its outline, 8 units wide around (9, 6); empty for none."""
    from matplotlib.markers import MarkerStyle

    if name in ("None", None, ""):
        return ""
    style = MarkerStyle(str(name))
    outline = style.get_path().transformed(style.get_transform())
    polygons = [np.asarray(each, float) for each in outline.to_polygons(closed_only=False)]
    return " ".join(
        "M" + "L".join(f"{9 + 8 * x:.1f} {6 - 8 * y:.1f}" for x, y in points.tolist())
        for points in polygons
    )


def tip(artist: Artist, text: str) -> None:
    """Show text when the pointer is over an artist, such as a bar."""
    artist.set_gid(_TIP + " ".join(printable_line(text).split()))


def point_tips(axes: Axes, points: Sequence[tuple[float, float]], texts: Sequence[str]) -> None:
    """Show text when the pointer is near a point of a line.

    Args:
        axes: the axes of the line.
        points: (x, y) in data coordinates; of many points, some evenly spaced ones are used.
        texts: one text per point.
    """
    every = max(1, -(-len(points) // _MAX_TIPS))
    for (x, y), text in list(zip(points, texts, strict=True))[::every]:
        (dot,) = axes.plot([x], [y], "o", ms=11, alpha=0, color=INK)
        tip(dot, text)


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Write one name per row beside the axes, the first at the top. Names never overlap there."""
    axes.set_yticks(range(len(names)), [plain(short(name)) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def short(name: str) -> str:
    """Return a name cut to the room beside an axis; tables and tooltips have it in full."""
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def few_ticks(axis: Axis, count: int = 6) -> None:
    """Place at most ``count`` ticks at round values."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=count))


def log_ticks(axis: Axis) -> None:
    """Place few ticks on a logarithmic axis, also if it covers less than one decade."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    low, high = sorted(axis.get_view_interval())
    narrow = low > 0 and high / low < 30
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if narrow else (1.0,), numticks=6))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


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
    axes: Axes, names: Sequence[str], layers: Sequence[tuple[str, Sequence[float]]], unit: str
) -> None:
    """Draw horizontal stacked bars.

    Args:
        axes: the axes to draw on.
        names: one name per bar, from the top.
        layers: (label, one value per bar); layers of zeros are left out.
        unit: the unit of the values in tooltips.
    """
    places = range(len(names))
    left = [0.0] * len(names)
    for number, (label, values) in enumerate(layers):
        if any(values):
            bars = axes.barh(
                places, values, left=left, height=0.62, color=colour(number), label=plain(label)
            )
            for bar, name, value in zip(bars, names, values, strict=True):
                tip(bar, f"{name}, {label}: {value:,.1f} {unit}")
        left = [start + value for start, value in zip(left, values, strict=True)]
    name_rows(axes, names)
    few_ticks(axes.xaxis)
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
    raw = re.sub(rf'<(g|image) id="{_TIP}([^"]*)"([^>]*?)(/?)>', _with_title, raw)
    # Several figures share a page, so unused ids would be duplicates.
    used = set(re.findall(r"#([A-Za-z][\w.-]*)", raw))
    raw = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", raw)
    # The page sets the width; the drawing keeps its proportions.
    return re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", raw, count=1).strip()


def _with_title(found: re.Match[str]) -> str:
    """Turn an id that holds the text of a tooltip into a title; matplotlib has escaped it."""
    tag, text, attributes, closed = found.groups()
    if closed:
        return f"<{tag}{attributes}><title>{text}</title></{tag}>"
    return f"<{tag}{attributes}><title>{text}</title>"
