"""What a comparison's record says of scores, as tables: one row a method and task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sparsegrad_cli.records.metric_direction import METRICS, common_metric, scale_of
from sparsegrad_cli.report.access import number, text
from sparsegrad_cli.report.columns import (
    METHOD,
    Column,
    count_cell,
    method_name,
    mib_cell,
    number_cell,
    rate_cell,
    rows_table,
)
from sparsegrad_cli.report.compare_record import (
    Row,
    bold_remark,
    difference_cell,
    figures_of,
    interval_of,
    methods_of,
    metric_of_rows,
    reference_of,
    rows_of,
    scale_of_rows,
    seeds_remark,
    tasks_of,
)
from sparsegrad_cli.report.labels import status_of, status_words
from sparsegrad_cli.report.tables import Cell, Table
from sparsegrad_cli.report.units import format_interval, format_score, format_spread


def status_cell(row: Row) -> str:
    """The status in words; done is not worth a word."""
    status = status_of(row)
    return "" if status == "done" else status_words(status)


def note_cell(row: Row) -> str:
    """Status and note of a row in one text."""
    return ": ".join(part for part in (status_cell(row), text(row, "note")) if part)


def _score(row: Row) -> Cell:
    mean = number(row, "score_mean")
    if mean is None:
        return status_cell(row) or None
    return format_spread(mean, number(row, "score_std"), scale_of(text(row, "metric")))


def _interval(row: Row) -> Cell:
    if number(row, "score_mean") is None:
        return ""
    ends = interval_of(row, "score_interval")
    return format_interval(*ends, scale_of(text(row, "metric"))) or "–"


def _seeds(row: Row) -> Cell:
    done, asked = number(row, "seeds_done"), number(row, "seeds_asked")
    return None if done is None or asked is None else f"{done:.0f}/{asked:.0f}"


def _published(compare: Any) -> Callable[[Row], Cell]:
    def cell(row: Row) -> Cell:
        found = figures_of(compare, text(row, "task"), text(row, "method"))
        scale = scale_of(text(row, "metric"))
        shown = [format_spread(number(f, "score"), number(f, "std"), scale) for f in found]
        return "; ".join(shown)

    return cell


def _score_and_seeds(row: Row) -> Cell:
    """The score; where seeds are missing, how many it is a mean of."""
    shown, done, asked = _score(row), number(row, "seeds_done"), number(row, "seeds_asked")
    return shown if shown is None or done == asked else f"{shown} ({_seeds(row) or '?'})"


# A terminal has a hundred characters; published figures have a table of their own there.
_NARROW = (
    Column("trainable", count_cell("trainable")),
    Column("peak\nMiB", mib_cell("peak_bytes")),
    Column("beyond\nMiB", mib_cell("beyond_weights_bytes")),
    Column("state\nMiB", mib_cell("optimizer_state_bytes")),
    Column("steps/s", rate_cell),
    Column("calib.\ns", number_cell("calibrate_s", 1)),
    Column("disk\nMiB", mib_cell("adapter_bytes")),
)


def _score_columns(compare: Any, rows: Sequence[Row]) -> list[Column]:
    scale = scale_of_rows(rows)
    found = [METHOD, Column(scale.column, _score, ranks=True)]
    if any(interval_of(row, "score_interval")[0] is not None for row in rows):
        found.append(Column("95 % interval", _interval))
    found.append(Column("seeds", _seeds))
    if any(figures_of(compare, text(row, "task"), text(row, "method")) for row in rows):
        found.append(Column("published", _published(compare)))
    against = reference_of(rows)
    if against is not None:
        found.append(Column(f"against {against}", difference_cell))
    if scale is not METRICS["loss"]:
        found.append(Column("validation loss", number_cell("validation_loss_mean", 3)))
    return found


def method_table(compare: Any, task: str) -> Table | None:
    """One row a method, narrow enough for a terminal: score, size, memory, speed, cost."""
    rows = rows_of(compare, task)
    seeds = max((s for s in (number(r, "seeds_asked") for r in rows) if s is not None), default=0)
    caption = f"{_caption(rows, task)}{f' ({seeds:.0f})' if seeds else ''}"
    score = Column(scale_of_rows(rows).column, _score_and_seeds, ranks=True)
    return rows_table(rows, [METHOD, score, *_NARROW], caption) if rows else None


def score_table(compare: Any, task: str) -> Table | None:
    """One row a method: score, interval, difference, loss. The best mean is strong."""
    rows = rows_of(compare, task)
    if not rows:
        return None
    notes = [remark for remark in (seeds_remark(rows), bold_remark(rows)) if remark]
    notes += [f"{method_name(row)}: {note_cell(row)}" for row in rows if note_cell(row)]
    return rows_table(rows, _score_columns(compare, rows), _caption(rows, task), notes)


def _caption(rows: Sequence[Row], task: str) -> str:
    return f"{task}: {scale_of_rows(rows).label}, mean ± standard deviation over seeds"


def overview_table(compare: Any) -> Table | None:
    """Methods by tasks, as papers print it, published rows below ours; for several tasks."""
    tasks, methods = tasks_of(compare), methods_of(compare)
    if len(tasks) < 2:
        return None
    metrics = [metric_of_rows(rows_of(compare, task)) for task in tasks]
    rows: list[tuple[Cell, ...]] = []
    for method in methods:
        row = {
            task: r for task in tasks for r in rows_of(compare, task) if r.get("method") == method
        }
        means = [number(row.get(task), "score_mean") for task in tasks]
        cells = [_score(row[task]) if task in row else None for task in tasks]
        rows.append((method, _average(means, metrics), *cells))
        rows += _published_rows(compare, method, tasks, metrics)
    header = ("method", "average", *tasks)
    return Table("Score by task, mean ± standard deviation over seeds", header, rows)


def _published_rows(
    compare: Any, method: str, tasks: Sequence[str], metrics: Sequence[str | None]
) -> list[tuple[Cell, ...]]:
    found = {task: figures_of(compare, task, method) for task in tasks}
    sources = dict.fromkeys(
        text(figure, "source") or "published" for figures in found.values() for figure in figures
    )
    rows: list[tuple[Cell, ...]] = []
    for source in sources:
        figures = [
            next((f for f in found[task] if (text(f, "source") or "published") == source), None)
            for task in tasks
        ]
        cells = [
            format_spread(number(f, "score"), number(f, "std"), scale_of(metric)) if f else ""
            for f, metric in zip(figures, metrics, strict=True)
        ]
        average = _average([number(f, "score") for f in figures], metrics)
        rows.append((f"{method}, {source}", average, *cells))
    return rows


def _average(values: Sequence[float | None], metrics: Sequence[str | None]) -> str:
    """The mean, where every task has a value of one kind; otherwise means cannot be compared: –."""
    there, metric = [value for value in values if value is not None], common_metric(metrics)
    if not there or len(there) < len(values) or metric is None:
        return "–"
    return format_score(sum(there) / len(there), scale_of(metric))
