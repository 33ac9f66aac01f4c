"""What the methods of a task take: entries, bytes, calibration. One row a method."""

from __future__ import annotations

from typing import Any

from sparsegrad_cli.report.access import number
from sparsegrad_cli.report.columns import (
    METHOD,
    Column,
    count_cell,
    mib_cell,
    number_cell,
    rows_table,
    speed_cell,
)
from sparsegrad_cli.report.compare_record import Row, rows_of
from sparsegrad_cli.report.tables import Cell, Table
from sparsegrad_cli.report.units import format_share


def counters_table(compare: Any, task: str) -> Table | None:
    """Entries trained at once and ever touched, and the bytes of a training step and an adapter."""
    columns = (
        METHOD,
        Column("trainable at once", count_cell("trainable")),
        Column("of them in targets", count_cell("trainable_targets")),
        Column("ever touched in targets", count_cell("touched_targets")),
        Column("optimizer state, MiB", mib_cell("optimizer_state_bytes")),
        Column("saved activations, MiB", mib_cell("saved_activation_bytes")),
        Column("peak, MiB", mib_cell("peak_bytes")),
        Column("beyond the weights, MiB", mib_cell("beyond_weights_bytes")),
        Column("adapter, MiB", mib_cell("adapter_bytes")),
        Column("steps/s", speed_cell),
    )
    rows = rows_of(compare, task)
    caption = f"{task}: what it takes; bytes are the most of any seed, the rest means over seeds"
    return rows_table(rows, columns, caption) if rows else None


def _share(row: Row) -> Cell:
    """Of calibration and training together."""
    seconds, train = number(row, "calibrate_s"), number(row, "train_s")
    if seconds is None or train is None or seconds + train <= 0:
        return None
    return format_share(seconds / (seconds + train))


def _peak(row: Row) -> Cell:
    return mib_cell("calibrate_peak_bytes")(row) if number(row, "calibrate_s") else "0.0"


def _tokens(row: Row) -> Cell:
    return count_cell("calibrate_tokens")(row) if number(row, "calibrate_s") else "0"


def calibration_costs(compare: Any, task: str) -> Table | None:
    """What calibration costs and who pays; None where no method of the task calibrates."""
    rows = rows_of(compare, task)
    if not any(number(row, "calibrate_s") for row in rows):
        return None
    columns = (
        METHOD,
        Column("seconds", number_cell("calibrate_s", 1)),
        Column("of the run", _share),
        Column("tokens", _tokens),
        Column("peak, MiB", _peak),
        Column("peak with training, MiB", mib_cell("peak_charged_bytes")),
        Column("runs on one basis", number_cell("basis_uses", 0)),
        Column("seconds a run", number_cell("calibrate_s_per_use", 1)),
    )
    note = (
        "every run is charged its basis whole; the last column shares it among the runs of this "
        "comparison that trained in the same basis"
    )
    caption = f"{task}: calibration, charged to the method; means over seeds"
    return rows_table(rows, columns, caption, (note,))
