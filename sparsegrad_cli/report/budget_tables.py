"""A comparison's budget: what each method was set to, and what it took. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sparsegrad_cli.report.access import block, items, mappings, number, numbers, text
from sparsegrad_cli.report.tables import Cell, Table
from sparsegrad_cli.report.units import (
    MIB,
    MINUS,
    format_amount,
    format_count,
    format_gib,
    format_mib,
    format_share,
)

Row = Mapping[str, Any]
Line = tuple[bool | None, str]
_IN_GIB = 10 * 2**30
_WORDS = {
    "trainable": "entries of the targets that a step changes",
    "optimizer_state": "bytes that the optimizer keeps",
    "peak": "bytes at the peak of a training step and of calibration, the weights among them",
}


def budget_of(compare: Any) -> Mapping[str, Any]:
    """The block of a comparison under a budget; empty without."""
    found = block(compare, "budget")
    return found if mappings(found, "rows") else {}


def budget_table(compare: Any) -> Table | None:
    """One row a task and method: what was picked, what it was to take and took, what was left."""
    budget = budget_of(compare)
    if not budget:
        return None
    kind = text(budget, "kind")
    unit, show = _unit(kind, number(budget, "request"))
    rows = [_cells(row, budget, show) for row in mappings(budget, "rows")]
    columns = ("predicted", "measured", "left over")
    header = ("task", "method", "set to", *(f"{name}{unit}" for name in columns), "request")
    what = _WORDS.get(kind or "", "not recorded")
    caption = f"Budget {text(budget, 'match') or '?'}: {what}"
    notes = [*budget_flags(compare), *_notes(budget)]
    return Table(caption, header, rows, left=3, prose=1, notes=notes).without_empty()


def _unit(kind: str | None, request: float | None) -> tuple[str, Callable[[float | None], Cell]]:
    """What a column's name says of its unit, and how a figure is written in it."""
    if kind == "trainable":
        return "", lambda value: None if value is None else format_count(value)
    if (request or 0) >= _IN_GIB:
        return ", GiB", format_gib
    if (request or 0) < MIB:
        return ", KiB", lambda value: None if value is None else f"{value / 1024:,.1f}"
    return ", MiB", format_mib


def _cells(row: Row, budget: Mapping[str, Any], show: Callable[[float | None], Cell]) -> Any:
    measured, request = number(row, "measured"), number(budget, "request")
    left = number(row, "remainder")
    if measured is not None and request is not None and row.get("matched") is not False:
        left = request - measured
    shown = show(left)
    return (
        text(row, "task"),
        text(row, "method"),
        setting_words(row),
        show(number(row, "predicted")) or "",
        show(measured) or "",
        (shown or "").replace("-", MINUS),
        _verdict(row),
    )


def _verdict(row: Row) -> str:
    if row.get("matched") is False:
        return "outside of it"
    deviation, verdict = number(row, "deviation"), text(row, "verdict")
    if deviation is None or verdict is None:
        return ""
    return f"{verdict}, {_signed(deviation)}"


def _signed(share: float) -> str:
    return f"{'+' if share >= 0 else MINUS}{format_share(abs(share))}"


def setting_words(row: Row) -> str:
    """``rank 11``; ``all entries, batch 16 × 2``; ``1,204 steps``."""
    if row.get("matched") is False:
        return "as the recipe says"
    found = block(row, "set")
    parts = [text(row, "size") or "?"]
    for word, size, count in (
        ("batch", "train.per_device_train_batch_size", "train.gradient_accumulation_steps"),
        ("calibration", "calibration.batch_size", "calibration.steps"),
    ):
        examples, times = number(found, size), number(found, count)
        if examples is not None and times is not None:
            parts.append(f"{word} {examples:.0f} × {times:.0f}")
    return ", ".join(parts)


def _notes(budget: Mapping[str, Any]) -> list[str]:
    notes: list[str] = []
    for row in mappings(budget, "rows"):
        shape = numbers(row, "shape")
        if len(shape) == 2:
            counted = f"{shape[0]:.0f} x {shape[1]:.0f} tokens, {text(row, 'shape_from')}"
            notes.append(f"{text(row, 'task')}: counted at {counted}")
    for row in mappings(budget, "rows"):
        said = [note for note in map(text, items(row, "notes")) if note]
        notes += [f"{text(row, 'task')} {text(row, 'method')}: {note}" for note in said]
    if text(budget, "kernels") is not None:
        notes.append(f"counted for {(text(budget, 'kernels') or '').upper()} kernels")
    return list(dict.fromkeys(notes))


def budget_lines(compare: Any) -> list[Line]:
    """(held, sentence): what met the budget, and what took more than was asked for."""
    budget = budget_of(compare)
    rows, match = mappings(budget, "rows"), text(budget, "match") or "?"
    met = sum(text(row, "verdict") == "met" for row in rows)
    lines: list[Line] = []
    if met:
        share = f"{100 * (number(budget, 'tolerance') or 0.0):.3g} %"
        counted = f"{met} of {len(rows)} rows" if met < len(rows) else f"all {met} rows"
        lines.append((True, f"Budget {match}: {counted} took what was asked for, within {share}."))
    for row in rows:
        if text(row, "verdict") == "over":
            kind = text(budget, "kind")
            lines.append((False, f"{_took(row, kind)}, {_beyond(row, 'MORE', match)}."))
    return lines


def budget_flags(compare: Any) -> list[str]:
    """In a sentence each: who took less than was asked for, and why; who was not held to it."""
    budget = budget_of(compare)
    kind, match = text(budget, "kind"), text(budget, "match") or "?"
    flags = []
    for row in mappings(budget, "rows"):
        if number(row, "measured") is None:
            continue
        if row.get("matched") is False:
            flags.append(f"{_took(row, kind)}, outside of {match} as the study says.")
        elif text(row, "verdict") == "under":
            less = _beyond(row, "less", match)
            flags.append(f"{_took(row, kind)}, {less}{_because(row, kind)}.")
    return flags


def _took(row: Row, kind: str | None) -> str:
    who = f"{text(row, 'task') or '?'}: {text(row, 'method') or '?'}"
    return f"{who} took {format_amount(number(row, 'measured'), kind)}"


def _beyond(row: Row, word: str, match: str) -> str:
    """How far off the run furthest from the request was."""
    share = format_share(abs(number(row, "deviation") or 0.0))
    return f"{share} {word} than {match}"


def _because(row: Row, kind: str | None) -> str:
    """Why a method could not spend more, as far as the solver knows."""
    size, takes = text(row, "larger", "size"), number(row, "larger", "takes")
    if size is not None and takes is not None:
        return f": {size} would take {format_amount(takes, kind)}"
    limit = text(row, "limit")
    return f": {limit}" if limit else ""


def plan_tables(plan: Any) -> list[Table]:
    """What a comparison would run: a row a task and method, and its budget if there is one."""
    rows: list[tuple[Cell, ...]] = []
    for row in mappings(plan, "rows"):
        method, train = block(row, "recipe", "method"), block(row, "recipe", "train")
        said = [
            f"{key} {text(method, key)}"
            for key in ("form", "support", "rank", "density", "entries")
            if text(method, key)
        ]
        steps = number(train, "max_steps")
        rows.append(
            (
                text(row, "task"),
                text(row, "method"),
                ", ".join([text(method, "name") or "?", *said]),
                f"{text(train, 'per_device_train_batch_size')} × "
                f"{text(train, 'gradient_accumulation_steps')}",
                f"{text(train, 'num_train_epochs')} epochs"
                if steps is None or steps < 0
                else f"{steps:,.0f} steps",
                text(train, "learning_rate"),
            )
        )
    seeds = ", ".join(filter(None, map(text, items(plan, "seeds"))))
    caption = f"{text(plan, 'name')}: {number(plan, 'cells') or 0:.0f} cells, seeds {seeds}"
    trials = number(plan, "trials")
    if trials is not None:
        caption += f", after {trials:.0f} trials of tuning for each row"
    header = ("task", "method", "settings", "batch", "length", "rate")
    listed = Table(caption, header, rows, left=3)
    budget = budget_table(plan)
    return [listed] if budget is None else [listed, budget]
