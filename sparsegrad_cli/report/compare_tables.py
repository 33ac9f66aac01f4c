"""What a comparison's record says, as tables: one row a method and task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sparsegrad_cli.report.access import mappings, number, text
from sparsegrad_cli.report.compare_record import (
    Row,
    difference_cell,
    figures_of,
    methods_of,
    reference_of,
    rows_of,
    scale_of_rows,
    seeds_remark,
    tasks_of,
)
from sparsegrad_cli.report.tables import Cell, Table
from sparsegrad_cli.report.units import (
    format_count,
    format_mib,
    format_number,
    format_score,
    format_spread,
)
from sparsegrad_cli.report.words import reason, status_of, status_words
from sparsegrad_cli.scales import METRICS, Scale, scale_of


@dataclass(frozen=True)
class Column:
    """One column: its name, and its cell in a row."""

    name: str
    cell: Callable[[Row], Cell]


def status_cell(row: Row) -> str:
    """The status in words; done is not worth a word."""
    status = status_of(row)
    return "" if status == "done" else status_words(status)


def note_cell(row: Row) -> str:
    """Status and note of a row in one text."""
    return ": ".join(part for part in (status_cell(row), text(row, "note")) if part)


def _name(row: Row) -> str:
    return text(row, "method") or "?"


def _score(row: Row) -> Cell:
    mean = number(row, "score_mean")
    if mean is None:
        return status_cell(row) or None
    return format_spread(mean, number(row, "score_std"), scale_of(text(row, "metric")))


def _seeds(row: Row) -> Cell:
    done, asked = number(row, "seeds_done"), number(row, "seeds_asked")
    return None if done is None or asked is None else f"{done:.0f}/{asked:.0f}"


def _count(*keys: str) -> Callable[[Row], Cell]:
    def cell(row: Row) -> Cell:
        value = number(row, *keys)
        return None if value is None else format_count(value)

    return cell


def _mib(*keys: str) -> Callable[[Row], Cell]:
    return lambda row: format_mib(number(row, *keys))


def _speed(row: Row) -> Cell:
    rate, spread = number(row, "steps_per_s"), number(row, "steps_per_s_iqr")
    if rate is None:
        return None
    return format_number(rate) if spread is None else f"{rate:.3g} ± {spread / 2:.2g}"


def _plain(key: str, digits: int) -> Callable[[Row], Cell]:
    def cell(row: Row) -> Cell:
        value = number(row, key)
        return None if value is None else f"{value:,.{digits}f}"

    return cell


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


def _rate(row: Row) -> Cell:
    rate = number(row, "steps_per_s")
    return None if rate is None else format_number(rate)


_COSTS = (
    Column("peak, MiB", _mib("peak_bytes")),
    Column("beyond the weights, MiB", _mib("beyond_weights_bytes")),
    Column("optimizer state, MiB", _mib("memory_categories", "optimizer_state")),
    Column("steps/s", _speed),
    Column("calibration, s", _plain("calibrate_s", 1)),
    Column("adapter, MiB", _mib("adapter_bytes")),
)
_METHOD = Column("method", _name)
# The same in a hundred characters; published figures have a table of their own there.
_NARROW = (
    Column("trainable", _count("trainable")),
    Column("peak\nMiB", _mib("peak_bytes")),
    Column("beyond\nMiB", _mib("beyond_weights_bytes")),
    Column("state\nMiB", _mib("memory_categories", "optimizer_state")),
    Column("steps/s", _rate),
    Column("calib.\ns", _plain("calibrate_s", 1)),
    Column("disk\nMiB", _mib("adapter_bytes")),
)


def _score_columns(compare: Any, rows: Sequence[Row]) -> list[Column]:
    found = [_METHOD, Column(scale_of_rows(rows).column, _score), Column("seeds", _seeds)]
    if any(figures_of(compare, text(row, "task"), text(row, "method")) for row in rows):
        found.append(Column("published", _published(compare)))
    against = reference_of(rows)
    if against is not None:
        found.append(Column(f"against {against}", difference_cell))
    if scale_of_rows(rows) is not METRICS["loss"]:
        found.append(Column("validation loss", _plain("validation_loss_mean", 3)))
    return [
        *found,
        Column("trainable entries", _count("trainable")),
        Column("of them in targets", _count("trainable_targets")),
    ]


def method_table(compare: Any, task: str) -> Table | None:
    """One row a method, narrow enough for a terminal: score, size, memory, speed, cost."""
    rows = rows_of(compare, task)
    seeds = max((s for s in (number(r, "seeds_asked") for r in rows) if s is not None), default=0)
    caption = f"{_caption(rows, task)}{f' ({seeds:.0f})' if seeds else ''}"
    columns = [_METHOD, Column(scale_of_rows(rows).column, _score_and_seeds), *_NARROW]
    return _table(rows, columns, caption, ()) if rows else None


def score_table(compare: Any, task: str) -> Table | None:
    """One row a method: score, difference, loss, size. The best mean is strong."""
    rows = rows_of(compare, task)
    if not rows:
        return None
    notes = [remark] if (remark := seeds_remark(rows)) else []
    notes += [f"{_name(row)}: {note_cell(row)}" for row in rows if note_cell(row)]
    return _table(rows, _score_columns(compare, rows), _caption(rows, task), notes)


def cost_table(compare: Any, task: str) -> Table | None:
    """One row a method: memory, speed, calibration, size on disk."""
    rows = rows_of(compare, task)
    columns = [_METHOD, *_COSTS]
    return _table(rows, columns, f"{task}: what it costs, means over seeds", ()) if rows else None


def _caption(rows: Sequence[Row], task: str) -> str:
    return f"{task}: {scale_of_rows(rows).label}, mean ± standard deviation over seeds"


def _table(
    rows: Sequence[Row], columns: Sequence[Column], caption: str, notes: Sequence[str]
) -> Table:
    means = [number(row, "score_mean") for row in rows]
    there = [mean for mean in means if mean is not None]
    scores = next((c for c, column in enumerate(columns) if column.cell in _SCORES), None)
    strong = frozenset(
        (r, scores)
        for r, mean in enumerate(means)
        if scores is not None and len(there) > 1 and mean == scale_of_rows(rows).best(there)
    )
    cells = [tuple(column.cell(row) for column in columns) for row in rows]
    header = tuple(column.name for column in columns)
    return Table(caption, header, cells, strong=strong, notes=notes)


_SCORES = (_score, _score_and_seeds)


def overview_table(compare: Any) -> Table | None:
    """Methods by tasks, as papers print it, published rows below ours; for several tasks."""
    tasks, methods = tasks_of(compare), methods_of(compare)
    if len(tasks) < 2:
        return None
    scales = [scale_of_rows(rows_of(compare, task)) for task in tasks]
    rows: list[tuple[Cell, ...]] = []
    for method in methods:
        row = {
            task: r for task in tasks for r in rows_of(compare, task) if r.get("method") == method
        }
        means = [number(row.get(task), "score_mean") for task in tasks]
        cells = [_score(row[task]) if task in row else None for task in tasks]
        rows.append((method, _average(means, scales), *cells))
        rows += _published_rows(compare, method, tasks, scales)
    header = ("method", "average", *tasks)
    return Table("Score by task, mean ± standard deviation over seeds", header, rows)


def _published_rows(
    compare: Any, method: str, tasks: Sequence[str], scales: Sequence[Scale]
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
            format_spread(number(f, "score"), number(f, "std"), scale) if f is not None else ""
            for f, scale in zip(figures, scales, strict=True)
        ]
        average = _average([number(f, "score") for f in figures], scales)
        rows.append((f"{method}, {source}", average or "", *cells))
    return rows


def _average(values: Sequence[float | None], scales: Sequence[Scale]) -> Cell:
    """The mean, where every task has a value of one kind; otherwise means cannot be compared."""
    there = [value for value in values if value is not None]
    alike = len({(scale.times, scale.lower_is_better) for scale in scales}) == 1
    if not there or len(there) < len(values) or not alike:
        return None
    return format_score(sum(there) / len(there), scales[0])


def figures_table(compare: Any) -> Table | None:
    """Published figures beside ours, with the difference."""
    rows: list[tuple[Cell, ...]] = []
    for figure in mappings(compare, "figures"):
        task, method, score = text(figure, "task"), text(figure, "method"), number(figure, "score")
        if score is None:
            continue
        ours = [row for row in rows_of(compare, task or "") if text(row, "method") == method]
        mean, scale = number(ours[0], "score_mean") if ours else None, scale_of_rows(ours)
        rows.append(
            (
                *(text(figure, "source"), task, method),
                format_spread(score, number(figure, "std"), scale),
                format_spread(mean, number(ours[0], "score_std"), scale) if ours else None,
                format_score(mean - score, scale, sign=True) if mean is not None else None,
            )
        )
    if not rows:
        return None
    header = ("source", "task", "method", "published", "ours", "difference")
    return Table("Published figures beside ours", header, rows, left=3)


def failures_table(compare: Any) -> Table | None:
    """Cells that are not done, with their reasons."""
    rows: list[tuple[Cell, ...]] = [
        (
            *(text(cell, key) for key in ("task", "method", "seed")),
            status_words(status_of(cell)),
            reason(cell.get("error"))
            or ("" if status_of(cell) in ("pending", "running") else None),
            text(cell, "error", "fix") or "",
        )
        for cell in mappings(compare, "cells")
        if status_of(cell) != "done"
    ]
    if not rows:
        return None
    header = ("task", "method", "seed", "status", "reason", "what to do")
    return Table("Cells that are not done", header, rows, left=6)


def cells_table(compare: Any) -> Table | None:
    """Every cell: its score, its speed, its folder."""
    rows: list[tuple[Cell, ...]] = []
    for cell in mappings(compare, "cells"):
        score = number(cell, "run", "metrics", "best", "score")
        scale = scale_of(text(cell, "run", "task", "metric"))
        rate = number(cell, "run", "time", "steps_per_s")
        rows.append(
            (
                *(text(cell, key) for key in ("task", "method", "seed")),
                status_words(status_of(cell)),
                text(cell, "run_dir"),
                None if score is None else format_score(score, scale),
                None if rate is None else format_number(rate),
            )
        )
    header = ("task", "method", "seed", "status", "folder", "score", "steps/s")
    return Table("Cells", header, rows, left=5) if rows else None
