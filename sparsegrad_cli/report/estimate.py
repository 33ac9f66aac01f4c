"""Show an estimate in a terminal: memory by category and phase, sizes, assumptions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sparsegrad_cli.records.estimate import DeviceRoom, EstimateRecord, EstimateRow
from sparsegrad_cli.report.document import Bullets, Column, Document, Labelled, Paragraph, Table
from sparsegrad_cli.report.units import (
    GIB,
    NOT_RECORDED,
    TRAIN_STEP,
    format_bytes,
    format_count,
    format_gib,
    format_mib,
    format_seconds,
    words,
)

Show = Callable[[float | None], str]
RowColumn = Column[EstimateRow]

# Eight figures per row must fit into 80 columns, so the labels of CATEGORIES are too long.
_CATEGORIES = {
    "weights": "weights",
    "bases": "bases",
    "adapter": "adapter",
    "gradients": "gradients",
    "optimizer_state": "state",
    "saved_activations": "saved",
    "other": "other",
}
_LEGEND = (
    "adapter: what the method adds to the model or converts to float32; state: of the optimizer; "
    "saved: activations for the backward pass"
)
_MASKS = {
    "none": "no row of a batch is padded: attention needs no mask",
    "padding": "some rows of a batch are padded, so attention needs a mask",
    "packing": "rows hold several conversations, so attention needs a mask",
}
_KERNELS = {
    "cpu": "CPU: attention keeps queries, keys, values, output and one number per row, but all of "
    "its weights where dropout acts on them; dropout keeps scaled masks in the input's dtype",
    "cuda": "CUDA: flash or memory-efficient attention, which keeps queries, keys, values, output "
    "and one number per row, with or without dropout; dropout masks of one byte per element; "
    "AdamW on all tensors at once; not counted: rounding by the allocator and workspaces of "
    "matrix products",
}


def estimate_screen(record: EstimateRecord) -> Document:
    """Return the tables of an estimate, and its assumptions."""
    most = max((row.peak_bytes for row in record.rows), default=0)
    unit, show = ("GiB", format_gib) if most >= 10 * GIB else ("MiB", format_mib)
    tables = [
        _step_table(record.rows, unit, show),
        _phase_table(record.rows, unit, show),
        _size_table(record.rows, unit, show, record.room),
        *([_share_table(record.rows)] if record.conditions.shard else []),
    ]
    return Document(
        title="",
        status="done",
        lead=[
            *(tables if record.rows else []),
            Paragraph(""),
            Paragraph("Assumptions"),
            Bullets(_assumptions(record)),
            Labelled("took", format_seconds(record.seconds)),
        ],
    )


def _label_columns(rows: Sequence[EstimateRow]) -> list[RowColumn]:
    """Return the first columns: the method, and the task if there are several."""
    method: RowColumn = Column("method", lambda row: row.label, words=True)
    task: RowColumn = Column("task", lambda row: row.task, words=True)
    return [method] if len({row.task for row in rows}) == 1 else [task, method]


def _step_table(rows: Sequence[EstimateRow], unit: str, show: Show) -> Table:
    def category(key: str) -> RowColumn:
        return Column(_CATEGORIES[key], lambda row: show(getattr(row.categories, key)))

    columns = [
        *_label_columns(rows),
        *(category(key) for key in _CATEGORIES),
        RowColumn("peak", lambda row: show(row.peak_bytes)),
    ]
    caption = f"Peak of a training step, {unit}"
    return Table.of(rows, columns, caption, [_LEGEND, *_models(rows), _batches(rows)])


def _models(rows: Sequence[EstimateRow]) -> list[str]:
    """Return the models and the sources of their configurations."""
    return sorted(
        {
            f"{row.model.name}, {format_count(row.model.parameters)} parameters in "
            f"{row.model.dtype}{f' under {row.autocast} autocast' if row.autocast else ''}, "
            f"configuration: {row.model.configuration}"
            for row in rows
        }
    )


def _batches(rows: Sequence[EstimateRow]) -> str:
    shapes = sorted({" × ".join(map(format_count, row.batch_shape)) for row in rows})
    recomputed = any(row.gradient_checkpointing for row in rows)
    also = ", with gradient checkpointing" if recomputed else ""
    return f"batches of {', '.join(shapes)} tokens{also}"


def _phase_table(rows: Sequence[EstimateRow], unit: str, show: Show) -> Table:
    calibrates = any(row.calibrate_peak_bytes is not None for row in rows)

    def phase(name: str) -> RowColumn:
        return Column(
            name,
            lambda row: show(row.phases.get(name)),
            strong=lambda row: row.peak_phase == name,
        )

    def calibrate(row: EstimateRow) -> str:
        if row.calibrate_peak_bytes is None:
            return "none" if calibrates else NOT_RECORDED
        return show(row.calibrate_peak_bytes)

    columns = [
        *_label_columns(rows),
        *(phase(name) for name in TRAIN_STEP),
        RowColumn("calibrate", calibrate),
        RowColumn("evaluate", lambda row: show(row.evaluate_peak_bytes)),
    ]
    own = {format_count(row.calibrate_batch) for row in rows if row.calibrate_batch is not None}
    evaluated = {format_count(row.evaluate_batch) for row in rows}
    notes = [f"calibrate: batches of {', '.join(sorted(own))}, in the precision of training"]
    notes = notes if own else []
    notes.append(f"evaluate: batches of {', '.join(sorted(evaluated))}, of the same length")
    caption = f"Peak by phase, with the phases outside the training step, {unit}"
    return Table.of(rows, columns, caption, notes).without_empty()


def _size_table(
    rows: Sequence[EstimateRow], unit: str, show: Show, room: DeviceRoom | None
) -> Table:
    def trained(row: EstimateRow) -> str:
        counts = row.counts
        return format_count(
            counts.trainable_targets + counts.trainable_head + counts.trainable_rest
        )

    def largest(row: EstimateRow) -> str:
        if row.fit is None:
            return NOT_RECORDED
        size = format_count(row.fit.batch) if row.fit.batch else "none"
        return f"≥ {size}" if room and row.fit.batch == room.most_examples else size

    def its_peak(row: EstimateRow) -> str:
        if row.fit is None or row.fit.peak_bytes is None:
            return NOT_RECORDED
        return show(row.fit.peak_bytes + (room.overhead_bytes if room else 0))

    columns = [
        *_label_columns(rows),
        RowColumn("trained", trained),
        RowColumn("beyond weights", lambda row: show(row.beyond_weights_bytes)),
        RowColumn("largest batch", largest),
        RowColumn("its peak", its_peak),
        RowColumn("limited by", lambda row: words(row.fit.limited_by if row.fit else None)),
    ]
    caption = f"Trainable parameters, and the peak beyond the weights, {unit}"
    if room:
        caption += f"; the largest batch in {format_bytes(room.total_bytes)}"
    notes = _room_notes(rows, room) if room else []
    return Table.of(rows, columns, caption, notes).without_empty()


def _room_notes(rows: Sequence[EstimateRow], room: DeviceRoom) -> list[str]:
    notes = [
        f"its peak: including {format_bytes(room.overhead_bytes)} for the CUDA context, kernels "
        "and workspaces; where no batch fits, the peak of one example"
    ]
    limited = [row.label for row in rows if row.fit and row.fit.limited_by == "calibration"]
    if limited:
        notes.append(
            f"{', '.join(limited)}: a training step alone would fit a larger batch; "
            "calibration.batch_size sets another one for calibration"
        )
    larger = [
        f"{row.label} in {phase}"
        for row in rows
        for phase, peak in (
            ("calibrate", row.calibrate_peak_bytes),
            ("evaluate", row.evaluate_peak_bytes),
        )
        if (peak or 0) + room.overhead_bytes > room.total_bytes
    ]
    whole = [
        row.label
        for row in rows
        if row.share and row.share.whole_weights_bytes + room.overhead_bytes > room.total_bytes
    ]
    if whole:
        notes.append(
            "the whole weights, which each process holds before training, do not fit: "
            + ", ".join(whole)
        )
    if larger:
        notes.append(f"does not fit with the batch size of the recipe: {', '.join(larger)}")
    return notes


def _share_table(rows: Sequence[EstimateRow]) -> Table:
    """Return what one of several processes gathers and sends in an optimizer step."""

    def sent(kind: str) -> RowColumn:
        def of(row: EstimateRow) -> str:
            collectives = row.share.collectives if row.share else []
            return format_bytes(sum(c.sent_bytes for c in collectives if c.kind == kind))

        return Column(kind.replace("_", "-"), of)

    columns = [
        *_label_columns(rows),
        RowColumn(
            "whole weights",
            lambda row: format_bytes(row.share.whole_weights_bytes if row.share else None),
        ),
        RowColumn(
            "gathered", lambda row: format_bytes(row.share.gathered_bytes if row.share else None)
        ),
        *(sent(kind) for kind in ("all_gather", "reduce_scatter", "all_reduce")),
        RowColumn("sent", lambda row: format_bytes(row.share.sent_bytes if row.share else None)),
    ]
    notes = [
        "whole weights: each process holds them while it loads and calibrates; gathered: weights "
        "of other processes at the peak",
        "all-gather, reduce-scatter, all-reduce: bytes that one process sends in an optimizer "
        "step, with all its micro-batches, in a ring; sent: their sum",
    ]
    return Table.of(rows, columns, "Traffic of one process in an optimizer step", notes)


def _assumptions(record: EstimateRecord) -> list[str]:
    """Return the assumptions: those of all rows, then those of each row."""
    masks = dict.fromkeys(row.mask or "" for row in record.rows)
    lines = [
        _processes(record),
        _KERNELS.get(record.conditions.kernels, ""),
        *(_MASKS.get(m, "") for m in masks),
    ]
    labels: dict[str, list[str]] = {}
    for row in record.rows:
        for note in row.notes:
            labels.setdefault(note, []).append(row.label)
    for note, whose in labels.items():
        lines.append(note if len(whose) == len(record.rows) else f"{', '.join(whose)}: {note}")
    return [line for line in lines if line]


def _processes(record: EstimateRecord) -> str:
    conditions = record.conditions
    if conditions.shard is None:
        return ""
    shared = "shares of the weights (FSDP2)" if conditions.shard == "fsdp2" else "all weights (DDP)"
    return (
        f"{conditions.processes} processes with {shared}, simulated; all figures are those of one; "
        "not known: the overlap of traffic and computation, latency, and the network"
    )
