"""Published figures beside ours: scores, speed, memory, and settings that were tuned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sparsegrad_cli.records.metric_direction import METRICS, Scale
from sparsegrad_cli.report.access import dig, mappings, number, text
from sparsegrad_cli.report.compare_record import Row, rows_of, scale_of_rows, tasks_of
from sparsegrad_cli.report.tables import Cell, Table
from sparsegrad_cli.report.units import format_number, format_score, format_spread

AVERAGE = "average"  # as a figure's task: the mean over all tasks of the study
_MB = 10**6


def figures_table(compare: Any) -> Table | None:
    """One row a published figure: ours, and how they differ; of speed and memory, the ratio."""
    rows: list[tuple[Cell, ...]] = []
    for figure in mappings(compare, "figures"):
        for kind in _KINDS:
            published = number(figure, kind.key)
            if published is not None:
                rows.append(kind.row(compare, figure, published))
    if not rows:
        return None
    header = ("source", "task", "method", "figure", "published", "ours", "difference")
    return Table("Published figures beside ours", header, rows, left=4)


@dataclass(frozen=True)
class _Quantity:
    """A kind of figure that is a number of its own: its key, its name, where ours is."""

    key: str
    name: str
    ours: Callable[[Any, str, str], float | None]

    def row(self, compare: Any, figure: Row, published: float) -> tuple[Cell, ...]:
        ours = _averaged(compare, figure, self.ours)
        ratio = None if ours is None or not published else f"x {format_number(ours / published)}"
        return (
            *_about(figure, self.name),
            format_number(published),
            None if ours is None else format_number(ours),
            ratio,
        )


class _Score:
    """Scores have a scale and a spread."""

    key = "score"

    def row(self, compare: Any, figure: Row, published: float) -> tuple[Cell, ...]:
        task, method = text(figure, "task") or "", text(figure, "method") or ""
        tasks = tasks_of(compare) if task == AVERAGE else [task]
        scales = [scale_of_rows(rows_of(compare, each)) for each in tasks]
        scale = scales[0] if scales else scale_of_rows([])
        mean = None
        if _of_one_size(scales):
            mean = _averaged(compare, figure, _of_row("score_mean"))
        std = _of_row("score_std")(compare, task, method) if task != AVERAGE else None
        return (
            *_about(figure, "score"),
            format_spread(published, number(figure, "std"), scale),
            None if mean is None else format_spread(mean, std, scale),
            None if mean is None else format_score(mean - published, scale, sign=True),
        )


def _of_one_size(scales: list[Scale]) -> bool:
    """Fractions may be averaged, as papers do on GLUE, and losses; not one with the other."""
    return len({scale is METRICS["loss"] for scale in scales}) == 1


def _about(figure: Row, name: str) -> tuple[Cell, ...]:
    return text(figure, "source"), text(figure, "task"), text(figure, "method"), name


def _averaged(
    compare: Any, figure: Row, ours: Callable[[Any, str, str], float | None]
) -> float | None:
    """Of the figure's task, or the mean over all tasks if every one has a value."""
    task, method = text(figure, "task") or "", text(figure, "method") or ""
    if task != AVERAGE:
        return ours(compare, task, method)
    found = [ours(compare, each, method) for each in tasks_of(compare)]
    there = [value for value in found if value is not None]
    return sum(there) / len(there) if there and len(there) == len(found) else None


def _of_row(key: str, per: float = 1) -> Callable[[Any, str, str], float | None]:
    def find(compare: Any, task: str, method: str) -> float | None:
        rows = [row for row in rows_of(compare, task) if text(row, "method") == method]
        value = number(rows[0], key) if rows else None
        return None if value is None else value / per

    return find


def _tuned_rate(compare: Any, task: str, method: str) -> float | None:
    for series in mappings(compare, "tuning", "series"):
        if (text(series, "task"), text(series, "method")) == (task, method):
            return number(dig(series, "best", "settings"), "train.learning_rate")
    return None


_KINDS = (
    _Score(),
    _Quantity("steps_per_s", "steps/s", _of_row("steps_per_s")),
    _Quantity("peak_mb", "peak, MB", _of_row("peak_bytes", per=_MB)),
    _Quantity("learning_rate", "tuned learning rate", _tuned_rate),
)
