"""Show the scores of a study by method and task, next to published results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sparsegrad_cli.records.metric_direction import METRICS, Scale, common_metric, scale_of
from sparsegrad_cli.records.study import CellEntry, PublishedFigure, ResultRow, StudyRecord
from sparsegrad_cli.report.document import Column, Table
from sparsegrad_cli.report.units import (
    NOT_RECORDED,
    NOTHING,
    format_count,
    format_fixed,
    format_interval,
    format_mib,
    format_number,
    format_score,
    format_spread,
    status_words,
)

MIN_SEEDS = 2  # With fewer seeds, methods are not ranked.
AVERAGE = "average"  # The task of a published mean over all tasks.
_MB = 10**6

Ours = Callable[[StudyRecord, str, str], float | None]  # Takes study, task, method.


def tasks_of(study: StudyRecord) -> list[str]:
    """Return the tasks in the order of the study, then those that only results or runs name."""
    found = [*(row.task for row in study.rows), *(cell.task for cell in study.cells)]
    return list(dict.fromkeys([*study.tasks, *found]))


def methods_of(study: StudyRecord) -> list[str]:
    """Return the methods in the order of the study, then those that only results or runs name."""
    found = [*(row.method for row in study.rows), *(cell.method for cell in study.cells)]
    return list(dict.fromkeys([*study.methods, *found]))


def rows_of(study: StudyRecord, task: str) -> list[ResultRow]:
    """Return the results of a task, one per method."""
    return [row for row in study.rows if row.task == task]


def cells_of(study: StudyRecord, task: str, method: str) -> list[CellEntry]:
    """Return the runs of a task and method, one per seed."""
    return [cell for cell in study.cells if (cell.task, cell.method) == (task, method)]


def published_for(study: StudyRecord, task: str, method: str) -> list[PublishedFigure]:
    """Return the published scores of a method on a task."""
    return [
        figure
        for figure in study.figures
        if (figure.task, figure.method) == (task, method) and figure.score is not None
    ]


def scale_of_rows(rows: Sequence[ResultRow]) -> Scale:
    """Return the scale of a task's scores, from the first row that has a metric."""
    found = next((row for row in rows if row.metric), None)
    return scale_of(found.metric, found.positive_label) if found else scale_of(None)


def best_rows(rows: Sequence[ResultRow]) -> list[ResultRow]:
    """Return the rows with the best mean; none if any score has only one seed."""
    there = [row for row in rows if row.score_mean is not None]
    if len(there) < 2 or min(row.seeds_done for row in there) < MIN_SEEDS:
        return []
    best = scale_of_rows(rows).best([row.score_mean or 0.0 for row in there])
    return [row for row in there if row.score_mean == best]


def few_seeds(rows: Sequence[ResultRow]) -> str:
    """Return a remark if a score has only one seed."""
    if min((row.seeds_done for row in rows if row.score_mean is not None), default=9) >= MIN_SEEDS:
        return ""
    return "n = 1: with one seed, methods are not ranked and scores have no interval"


# --- scores


def _score(row: ResultRow) -> str:
    if row.score_mean is None:
        return _status(row) or NOT_RECORDED
    return format_spread(row.score_mean, row.score_std, scale_of(row.metric))


def _status(row: ResultRow) -> str:
    return "" if row.status == "done" else status_words(row.status)


def note_words(row: ResultRow) -> str:
    return ": ".join(part for part in (_status(row), row.note) if part)


def _seeds(row: ResultRow) -> str:
    return f"{row.seeds_done}/{row.seeds_asked}"


def difference_words(row: ResultRow) -> str:
    """Return ``+1.0 (−2.1 to 4.1)`` or ``+1.0 (one seed)``; empty for the reference method."""
    found = row.difference
    if found is None or found.mean is None:
        return ""
    scale = scale_of(row.metric)
    interval = format_interval(scale.clip_difference(found.interval), scale)
    if found.interval is None:
        interval = "one seed" if found.n == 1 else "no interval"
    return f"{format_score(found.mean, scale, sign=True)} ({interval})"


def reference_of(rows: Sequence[ResultRow]) -> str | None:
    """Return the reference method of the differences."""
    return next((row.difference.against for row in rows if row.difference), None)


def _score_column(rows: Sequence[ResultRow], cell: Callable[[ResultRow], str]) -> Column[ResultRow]:
    best = [row.method for row in best_rows(rows)]
    return Column(scale_of_rows(rows).column, cell, strong=lambda row: row.method in best)


METHOD: Column[ResultRow] = Column("method", lambda row: row.method, words=True)


def score_table(study: StudyRecord, task: str) -> Table | None:
    """Return one row per method: score, interval, difference, loss. The best mean is bold."""
    rows = rows_of(study, task)
    if not rows:
        return None
    scale, against = scale_of_rows(rows), reference_of(rows)
    columns: list[Column[ResultRow]] = [METHOD, _score_column(rows, _score)]
    if any(row.score_interval for row in rows):
        columns.append(Column("95 % interval", lambda row: _interval(row)))
    columns.append(Column("seeds", _seeds))
    if any(published_for(study, task, row.method) for row in rows):
        columns.append(Column("published", lambda row: _published(study, row)))
    if against is not None:
        columns.append(Column(f"against {against}", difference_words))
    if scale is not METRICS["loss"]:
        runs = [cell.run for cell in study.cells if cell.run is not None]
        tested = any(run.task is not None and run.task.test_examples for run in runs)
        loss = Column[ResultRow](
            "test loss" if tested else "validation loss",
            lambda row: format_fixed(row.validation_loss_mean, 3),
        )
        columns.append(loss)
    notes = [few_seeds(rows)]
    if best_rows(rows):
        notes.append("bold: the best mean; Differences says whether it is better than another")
    if any(scale.clip(row.score_interval) != row.score_interval for row in rows):
        notes.append("intervals end where the metric does; with few seeds they are very wide")
    notes += [f"{row.method}: {note}" for row in rows if (note := note_words(row))]
    return Table.of(rows, columns, _caption(rows, task), [note for note in notes if note])


def _interval(row: ResultRow) -> str:
    if row.score_mean is None:
        return ""
    scale = scale_of(row.metric)
    return format_interval(scale.clip(row.score_interval), scale)


def _published(study: StudyRecord, row: ResultRow) -> str:
    found = published_for(study, row.task, row.method)
    return "; ".join(format_spread(f.score, f.std, scale_of(row.metric)) for f in found)


def _caption(rows: Sequence[ResultRow], task: str) -> str:
    return f"{task}: {scale_of_rows(rows).label}, mean ± standard deviation over seeds"


def summary_table(study: StudyRecord, task: str) -> Table | None:
    """Return one row per method for a terminal: score, size, memory, speed, cost."""
    rows = rows_of(study, task)
    if not rows:
        return None

    def score(row: ResultRow) -> str:
        complete = row.score_mean is None or row.seeds_done == row.seeds_asked
        return _score(row) if complete else f"{_score(row)} ({_seeds(row)})"

    columns: list[Column[ResultRow]] = [
        METHOD,
        _score_column(rows, score),
        Column("trainable", lambda row: format_count(row.trainable)),
        Column("peak\nMiB", lambda row: format_mib(row.peak_bytes)),
        Column("beyond\nMiB", lambda row: format_mib(row.beyond_weights_bytes)),
        Column("state\nMiB", lambda row: format_mib(row.optimizer_state_bytes)),
        Column("steps/s", lambda row: format_number(row.steps_per_s)),
        Column("calib.\ns", lambda row: format_fixed(row.calibrate_s, 1)),
        Column("disk\nMiB", lambda row: format_mib(row.adapter_bytes)),
    ]
    seeds = max(row.seeds_asked for row in rows)
    return Table.of(rows, columns, f"{_caption(rows, task)} ({seeds})")


def overview_table(study: StudyRecord) -> Table | None:
    """Return methods by tasks, with published results below ours; None for a single task."""
    tasks = tasks_of(study)
    if len(tasks) < 2:
        return None
    metrics = [_metric_of(study, task) for task in tasks]
    rows: list[tuple[str, ...]] = []
    for method in methods_of(study):
        found = [row_of(study, task, method) for task in tasks]
        means = [row.score_mean if row else None for row in found]
        cells = [_score(row) if row else NOT_RECORDED for row in found]
        rows.append((method, _average(means, metrics), *cells))
        rows += _published_rows(study, method, tasks, metrics)
    header = ("method", "average", *tasks)
    caption = "Score by task, mean ± standard deviation over seeds"
    return Table(caption, header, rows, (True, *(False for _ in header[1:])))


def _metric_of(study: StudyRecord, task: str) -> str | None:
    return next((row.metric for row in rows_of(study, task) if row.metric), None)


def row_of(study: StudyRecord, task: str, method: str) -> ResultRow | None:
    return next((row for row in rows_of(study, task) if row.method == method), None)


def _published_rows(
    study: StudyRecord, method: str, tasks: Sequence[str], metrics: Sequence[str | None]
) -> list[tuple[str, ...]]:
    """Return one row for each source that has results of the method."""
    by_task = [published_for(study, task, method) for task in tasks]
    rows = []
    for source in dict.fromkeys(figure.source for found in by_task for figure in found):
        figures: list[PublishedFigure | None] = [
            next((figure for figure in found if figure.source == source), None) for found in by_task
        ]
        cells = [
            format_spread(figure.score, figure.std, scale_of(metric)) if figure else ""
            for figure, metric in zip(figures, metrics, strict=True)
        ]
        average = _average([figure.score if figure else None for figure in figures], metrics)
        rows.append((f"{method}, {source}", average, *cells))
    return rows


def _average(values: Sequence[float | None], metrics: Sequence[str | None]) -> str:
    """Return the mean if every task has a value and the metrics can be averaged; else a dash."""
    there, metric = [value for value in values if value is not None], common_metric(metrics)
    if not there or len(there) < len(values) or metric is None:
        return NOTHING
    return format_score(sum(there) / len(there), scale_of(metric))


# --- published results next to ours


def published_table(study: StudyRecord) -> Table | None:
    """Return one row per published number: ours, and the difference, or the ratio for costs."""
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
    return Table("Published results next to ours", header, rows, words)


def _score_cells(
    study: StudyRecord, figure: PublishedFigure, published: float
) -> tuple[str, str, str]:
    tasks = tasks_of(study) if figure.task == AVERAGE else [figure.task]
    scales = [scale_of_rows(rows_of(study, task)) for task in tasks]
    scale = scales[0] if scales else scale_of_rows([])
    # Fractions can be averaged, as papers do on GLUE, and losses too, but not both together.
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
    shared = study.tuning is not None and not study.tuning.own_seeds
    for series in study.tuning.series if study.tuning and shared else []:
        if (series.task, series.method) == (task, method) and series.best:
            rate = series.best.settings.get("train.learning_rate")
            return rate if isinstance(rate, int | float) else None
    return None


@dataclass(frozen=True)
class _Cost:
    """A cost that papers publish: its key, its name, and how to find our value."""

    key: str
    name: str
    ours: Ours


_COSTS = (
    _Cost("steps_per_s", "steps/s", lambda *key: _row(*key).steps_per_s),
    _Cost("peak_mb", "peak, MB", _peak_mb),
    _Cost("learning_rate", "tuned learning rate", _tuned_rate),
)
