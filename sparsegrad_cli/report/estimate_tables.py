"""What an estimate says, as tables and lines. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sparsegrad_cli.report.access import block, items, mappings, number, text
from sparsegrad_cli.report.labels import TRAIN_STEP
from sparsegrad_cli.report.tables import Cell, Table
from sparsegrad_cli.report.units import format_bytes, format_count, format_gib, format_mib

_IN_GIB = 10 * 2**30
# Eight figures a row must fit into 80 columns: the words of CATEGORIES are too long here.
_COLUMNS = {
    "weights": "weights",
    "bases": "bases",
    "adapter": "adapter",
    "gradients": "gradients",
    "optimizer_state": "state",
    "saved_activations": "saved",
    "other": "other",
}
_LEGEND = (
    "adapter: what the method adds to the model, or makes float32 of it; state: the optimizer's; "
    "saved: for backward"
)
_MASKS = {
    "none": "no row of a batch is padded: attention has no mask",
    "padding": "some rows of a batch are padded, so attention has a mask",
    "packing": "rows hold several conversations, so attention has a mask",
}
_KERNELS = {
    "cpu": "CPU: attention keeps queries, keys, values, output and a number a row, but all of its "
    "weights where dropout acts on them; dropout keeps scaled masks in the input's dtype",
    "cuda": "CUDA: flash or memory-efficient attention, which keeps queries, keys, values, output "
    "and a number a row, dropout or not; dropout masks of a byte an entry; AdamW on all tensors "
    "at once; not counted: rounding by the allocator, workspaces of matrix products",
}
Rows = list[Mapping[str, Any]]
Show = Callable[[float | None], str | None]


def estimate_tables(record: Any) -> list[Table]:
    """The step by category, its phases, and sizes: entries, and batches where asked for."""
    rows = mappings(record, "rows")
    if not rows:
        return []
    most = max(number(row, "peak_bytes") or 0 for row in rows)
    unit, show = ("GiB", format_gib) if most >= _IN_GIB else ("MiB", format_mib)
    return [
        _step_table(rows, unit, show),
        _phase_table(rows, unit, show),
        _size_table(rows, unit, show, block(record, "room")),
    ]


def _labelled(rows: Rows) -> tuple[tuple[str, ...], list[tuple[Cell, ...]]]:
    """Header and cells of the leading columns: the method, and the task where there are several."""
    if len({text(row, "task") for row in rows}) == 1:
        return ("method",), [(text(row, "label"),) for row in rows]
    return ("task", "method"), [(text(row, "task"), text(row, "label")) for row in rows]


def _step_table(rows: Rows, unit: str, show: Show) -> Table:
    header, labels = _labelled(rows)
    cells = [
        (
            *label,
            *(show(number(row, "categories", key)) for key in _COLUMNS),
            show(number(row, "peak_bytes")),
        )
        for label, row in zip(labels, rows, strict=True)
    ]
    return Table(
        f"Peak of a training step, {unit}",
        (*header, *_COLUMNS.values(), "peak"),
        cells,
        left=len(header),
        notes=[_LEGEND, *_shapes(rows)],
    )


def _shapes(rows: Rows) -> list[str]:
    """Models and where their configurations came from, and the shapes of the batches."""
    models = {
        f"{text(row, 'model', 'name')}, {format_count(number(row, 'model', 'parameters'))} "
        f"parameters in {text(row, 'model', 'dtype')}{_autocast(row)}, by "
        f"{text(row, 'model', 'configuration')}"
        for row in rows
    }
    shapes = {
        " × ".join(format_count(number(side)) for side in items(row, "batch_shape")) for row in rows
    }
    recomputing = any(row.get("gradient_checkpointing") for row in rows)
    also = ", with gradient checkpointing" if recomputing else ""
    return [*sorted(models), f"batches of {', '.join(sorted(shapes))} tokens{also}"]


def _autocast(row: Mapping[str, Any]) -> str:
    half = text(row, "autocast")
    return f" under {half} autocast" if half else ""


def _phase_table(rows: Rows, unit: str, show: Show) -> Table:
    header, labels = _labelled(rows)
    cells: list[tuple[Cell, ...]] = []
    strong = set()
    some = any(number(row, "calibrate_peak_bytes") is not None for row in rows)
    for place, (label, row) in enumerate(zip(labels, rows, strict=True)):
        step = [show(number(row, "phases", phase)) for phase in TRAIN_STEP]
        calibrates = show(number(row, "calibrate_peak_bytes")) or ("none" if some else None)
        cells.append((*label, *step, calibrates, show(number(row, "evaluate_peak_bytes"))))
        highest = text(row, "peak_phase")
        if highest in TRAIN_STEP:
            strong.add((place, len(header) + TRAIN_STEP.index(highest)))
    sizes = {format_count(number(row, "evaluate_batch")) for row in rows}
    batches = [number(row, "calibrate_batch") for row in rows]
    own = sorted({format_count(batch) for batch in batches if batch is not None})
    notes = [f"calibrate: batches of {', '.join(own)}, in training's precision"] if own else []
    return Table(
        f"Peak by phase, and of what is no part of the step, {unit}",
        (*header, *TRAIN_STEP, "calibrate", "evaluate"),
        cells,
        left=len(header),
        strong=frozenset(strong),
        notes=[*notes, f"evaluate: batches of {', '.join(sorted(sizes))}, as long"],
    ).without_empty()


def _size_table(rows: Rows, unit: str, show: Show, room: Mapping[str, Any]) -> Table:
    header, labels = _labelled(rows)
    cells: list[tuple[Cell, ...]] = []
    for label, row in zip(labels, rows, strict=True):
        parts = [number(row, "counts", f"trainable_{part}") for part in ("targets", "head", "rest")]
        trained = format_count(sum(part or 0 for part in parts))
        beyond = show(number(row, "beyond_weights_bytes"))
        cells.append((*label, trained, beyond, *_fit_cells(row, show, room)))
    caption = f"Entries that train, and the peak beyond the weights, {unit}"
    if room:
        caption += f"; the largest batch in {format_bytes(number(room, 'total_bytes'))}"
    return Table(
        caption,
        (*header, "trained", "beyond weights", "largest batch", "its peak", "limited by"),
        cells,
        left=len(header),
        notes=_fit_notes(rows, room) if room else (),
    ).without_empty()


def _fit_cells(row: Mapping[str, Any], show: Show, room: Mapping[str, Any]) -> tuple[Cell, ...]:
    batch, peak = number(row, "fit", "batch"), number(row, "fit", "peak_bytes")
    if batch is None or peak is None:
        return None, None, None
    size = format_count(batch) if batch else "none"
    if batch == number(room, "most_examples"):
        size = f"≥ {size}"
    return size, show(peak + (number(room, "overhead_bytes") or 0)), text(row, "fit", "limited_by")


def _fit_notes(rows: Rows, room: Mapping[str, Any]) -> list[str]:
    overhead = number(room, "overhead_bytes") or 0
    total = number(room, "total_bytes") or 0
    notes = [
        f"its peak: with {format_bytes(overhead)} for the CUDA context, kernels and workspaces; "
        "where no batch fits, that of one example"
    ]
    limited = [
        text(row, "label") for row in rows if text(row, "fit", "limited_by") == "calibration"
    ]
    if limited:
        notes.append(
            f"{', '.join(map(str, limited))}: the step alone would fit a larger batch; "
            "calibration.batch_size sets another one for calibration"
        )
    larger = [
        f"{text(row, 'label')} in {phase}"
        for row in rows
        for phase in ("calibrate", "evaluate")
        if (number(row, f"{phase}_peak_bytes") or 0) + overhead > total
    ]
    if larger:
        notes.append(f"needs more than there is at the recipe's own batch: {', '.join(larger)}")
    return notes


def estimate_notes(record: Any) -> list[str]:
    """What was supposed: for all rows, then row by row."""
    conditions = block(record, "conditions")
    rows = mappings(record, "rows")
    masks = dict.fromkeys(text(row, "mask") or "" for row in rows)
    lines = [_KERNELS.get(text(conditions, "kernels") or "", "")]
    lines += [_MASKS.get(mask, "") for mask in masks]
    said: dict[str, list[str]] = {}
    for row in rows:
        for note in items(row, "notes"):
            said.setdefault(str(note), []).append(text(row, "label") or "?")
    for note, labels in said.items():
        whose = "" if len(labels) == len(rows) else f"{', '.join(labels)}: "
        lines.append(whose + note)
    return [line for line in lines if line]
