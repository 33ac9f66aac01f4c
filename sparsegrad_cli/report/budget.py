"""Build the tables and checks of a study's budget and plan: predicted and measured costs."""

from __future__ import annotations

from collections.abc import Callable

from sparsegrad_cli.records.study import BudgetBlock, BudgetRow, PlanRecord, PlanRow
from sparsegrad_cli.report.document import Check, Column, Document, Table
from sparsegrad_cli.report.units import (
    GIB,
    MIB,
    MINUS,
    NOT_RECORDED,
    format_amount,
    format_count,
    format_gib,
    format_kib,
    format_mib,
    format_share,
    format_signed_share,
    words,
)

_KINDS = {
    "trainable": "parameters of the targets that a step changes",
    "optimizer_state": "bytes that the optimizer keeps",
    "peak": "bytes at the peak of a training step and of calibration, including the weights",
}
_BATCHES = (
    ("batch", "train.per_device_train_batch_size", "train.gradient_accumulation_steps"),
    ("calibration", "calibration.batch_size", "calibration.steps"),
)


def budget_table(budget: BudgetBlock | None) -> Table | None:
    """Return one row per task and method: size, and predicted, measured and unused amounts."""
    if budget is None or not budget.rows:
        return None
    unit, show = _unit(budget)
    columns: list[Column[BudgetRow]] = [
        Column("task", lambda row: row.task, words=True),
        Column("method", lambda row: row.method, words=True),
        Column("size", size_words, words=True),
        Column(f"predicted{unit}", lambda row: _or_empty(show, row.predicted)),
        Column(f"measured{unit}", lambda row: _or_empty(show, row.measured)),
        Column(f"left over{unit}", lambda r: _or_empty(show, _left(r, budget)).replace("-", MINUS)),
        Column("budget", _verdict, words=True),
    ]
    what = _KINDS.get(budget.kind or "", NOT_RECORDED)
    caption = f"Budget {budget.match}: {what}"
    notes = [*budget_flags(budget), *_notes(budget)]
    return Table.of(budget.rows, columns, caption, notes).without_empty()


def _unit(budget: BudgetBlock) -> tuple[str, Callable[[float | None], str]]:
    """Return the unit in a column's name, and the function that formats its figures."""
    request = budget.request or 0
    if budget.kind == "trainable":
        return "", format_count
    if request >= 10 * GIB:
        return ", GiB", format_gib
    return (", KiB", format_kib) if request < MIB else (", MiB", format_mib)


def _or_empty(show: Callable[[float | None], str], value: float | None) -> str:
    return "" if value is None else show(value)


def _left(row: BudgetRow, budget: BudgetBlock) -> float | None:
    if row.matched and row.measured is not None and budget.request is not None:
        return budget.request - row.measured
    return row.remainder


def _verdict(row: BudgetRow) -> str:
    if not row.matched:
        return "not applied"
    if row.deviation is None or row.verdict is None:
        return ""
    return f"{row.verdict}, {format_signed_share(row.deviation)}"


def size_words(row: BudgetRow) -> str:
    """Return a size: ``rank 11``; ``all parameters, batch 16 × 2``."""
    if not row.matched:
        return "as in the recipe"
    parts = [words(row.size)]
    for word, size, count in _BATCHES:
        examples, times = row.set.get(size), row.set.get(count)
        if examples is not None and times is not None:
            parts.append(f"{word} {examples} × {times}")
    return ", ".join(parts)


def _notes(budget: BudgetBlock) -> list[str]:
    notes = [
        f"{row.task}: counted at {row.shape[0]} x {row.shape[1]} tokens, {row.shape_from}"
        for row in budget.rows
        if row.shape and len(row.shape) == 2
    ]
    notes += [f"{row.task} {row.method}: {note}" for row in budget.rows for note in row.notes]
    if budget.kernels is not None:
        notes.append(f"counted for {budget.kernels.upper()} kernels")
    return list(dict.fromkeys(notes))


def budget_checks(budget: BudgetBlock | None) -> list[Check]:
    """Return the checks of the methods that met the budget or exceeded it."""
    if budget is None:
        return []
    rows, checks = budget.rows, []
    met = sum(row.verdict == "met" for row in rows)
    if met:
        share = f"{100 * (budget.tolerance or 0.0):.3g} %"
        which = f"{met} of {len(rows)} rows" if met < len(rows) else f"all {met} rows"
        checks.append(Check(True, f"Budget {budget.match}: {which} met it within {share}."))
    for row in rows:
        if row.verdict == "over":
            checks.append(Check(False, f"{_took(row, budget)}, {_off(row, 'MORE', budget)}."))
    return checks


def budget_flags(budget: BudgetBlock | None) -> list[str]:
    """Return a sentence for each method that stayed below the budget or was exempt from it."""
    if budget is None:
        return []
    flags = []
    for row in budget.rows:
        if row.measured is None:
            continue
        if not row.matched:
            flags.append(f"{_took(row, budget)}; the study exempts it from {budget.match}.")
        elif row.verdict == "under":
            why = _why_under(row, budget)
            flags.append(f"{_took(row, budget)}, {_off(row, 'less', budget)}{why}.")
    return flags


def _took(row: BudgetRow, budget: BudgetBlock) -> str:
    return f"{row.task}: {row.method} took {format_amount(row.measured, budget.kind)}"


def _off(row: BudgetRow, word: str, budget: BudgetBlock) -> str:
    return f"{format_share(abs(row.deviation or 0.0))} {word} than {budget.match}"


def _why_under(row: BudgetRow, budget: BudgetBlock) -> str:
    """Return the reason why a method could not use more, if the solver knows it."""
    if row.larger and row.larger.takes is not None:
        return f": {row.larger.size} would take {format_amount(row.larger.takes, budget.kind)}"
    return f": {row.limit}" if row.limit else ""


def plan_screen(plan: PlanRecord) -> Document:
    """Return a plan for the terminal: one row per task and method, then the budget."""
    seeds = ", ".join(map(str, plan.seeds))
    caption = f"{plan.name}: {plan.cells} runs, seeds {seeds}"
    if plan.trials is not None:
        unit = "seed of a row" if plan.own_seeds else "row"
        caption += f", after {plan.trials} trials of tuning for each {unit}"
    columns: list[Column[PlanRow]] = [
        Column("task", lambda row: row.task, words=True),
        Column("method", lambda row: row.method, words=True),
        Column("settings", _settings, words=True),
        Column("batch", _batch),
        Column("length", _length),
        Column("rate", lambda row: words(row.recipe["train"]["learning_rate"])),
    ]
    return Document("", "", lead=[Table.of(plan.rows, columns, caption), budget_table(plan.budget)])


def _settings(row: PlanRow) -> str:
    method = row.recipe["method"]
    keys = ("form", "support", "rank", "density", "entries")
    said = [f"{key} {method[key]}" for key in keys if method.get(key) is not None]
    return ", ".join([method["name"], *said])


def _batch(row: PlanRow) -> str:
    train = row.recipe["train"]
    return f"{train['per_device_train_batch_size']} × {train['gradient_accumulation_steps']}"


def _length(row: PlanRow) -> str:
    train = row.recipe["train"]
    steps = train["max_steps"]
    return f"{steps:,} steps" if steps >= 0 else f"{words(train['num_train_epochs'])} epochs"
