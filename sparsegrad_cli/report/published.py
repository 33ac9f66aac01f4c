"""Published results beside ours: scores, speed, memory, and settings that were tuned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sparsegrad_cli.records.metric_direction import METRICS
from sparsegrad_cli.records.study import PublishedFigure, ResultRow, StudyRecord
from sparsegrad_cli.report.document import Table
from sparsegrad_cli.report.scores import row_of, rows_of, scale_of_rows, tasks_of
from sparsegrad_cli.report.units import NOT_RECORDED, format_number, format_score, format_spread

AVERAGE = "average"  # as the task of a published result: the mean over all tasks of the study
_MB = 10**6

Ours = Callable[[StudyRecord, str, str], float | None]  # study, task, method


def published_table(study: StudyRecord) -> Table | None:
    """Return one row a published number: ours, and the difference or, of costs, the ratio."""
    rows = []
    for figure in study.figures:
        about = (figure.source, figure.task, figure.method)
        if figure.score is not None:
            rows.append((*about, "score", *_score_cells(study, figure, figure.score)))
        for cost in _COSTS:
            published = getattr(figure, cost.key)
            if published is not None:
                rows.append((*about, cost.name, *_cost_cells(study, figure, published, cost.ours)))
    if not rows:
        return None
    header = ("source", "task", "method", "figure", "published", "ours", "difference")
    words = (True, True, True, True, False, False, False)
    return Table("Published results beside ours", header, rows, words)


def _score_cells(
    study: StudyRecord, figure: PublishedFigure, published: float
) -> tuple[str, str, str]:
    tasks = tasks_of(study) if figure.task == AVERAGE else [figure.task]
    scales = [scale_of_rows(rows_of(study, task)) for task in tasks]
    scale = scales[0] if scales else scale_of_rows([])
    # Fractions may be averaged, as papers do on GLUE, and so may losses, but not both together.
    mixed = len({each is METRICS["loss"] for each in scales}) != 1
    mean = None if mixed else _averaged(study, figure, lambda *key: _row(*key).score_mean)
    std = _row(study, figure.task, figure.method).score_std
    return (
        format_spread(published, figure.std, scale),
        format_spread(mean, std, scale),
        NOT_RECORDED if mean is None else format_score(mean - published, scale, sign=True),
    )


def _cost_cells(
    study: StudyRecord, figure: PublishedFigure, published: float, ours: Ours
) -> tuple[str, str, str]:
    found = _averaged(study, figure, ours)
    known = found is not None and published
    ratio = f"x {format_number((found or 0.0) / published)}" if known else NOT_RECORDED
    return format_number(published), format_number(found), ratio


def _averaged(study: StudyRecord, figure: PublishedFigure, ours: Ours) -> float | None:
    """Return our value on the task, or the mean over all tasks if every one has a value."""
    if figure.task != AVERAGE:
        return ours(study, figure.task, figure.method)
    found = [ours(study, task, figure.method) for task in tasks_of(study)]
    there = [value for value in found if value is not None]
    return sum(there) / len(there) if there and len(there) == len(found) else None


def _row(study: StudyRecord, task: str, method: str) -> ResultRow:
    return row_of(study, task, method) or ResultRow(task=task, method=method)


def _peak_mb(study: StudyRecord, task: str, method: str) -> float | None:
    peak = _row(study, task, method).peak_bytes
    return None if peak is None else peak / _MB


def _tuned_rate(study: StudyRecord, task: str, method: str) -> float | None:
    for series in study.tuning.series if study.tuning else []:
        if (series.task, series.method) == (task, method) and series.best:
            rate = series.best.settings.get("train.learning_rate")
            return rate if isinstance(rate, int | float) else None
    return None


@dataclass(frozen=True)
class _Cost:
    """A cost that papers publish: its key, its name, and where ours is."""

    key: str
    name: str
    ours: Ours


_COSTS = (
    _Cost("steps_per_s", "steps/s", lambda *key: _row(*key).steps_per_s),
    _Cost("peak_mb", "peak, MB", _peak_mb),
    _Cost("learning_rate", "tuned learning rate", _tuned_rate),
)
