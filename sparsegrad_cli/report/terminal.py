"""Records in the terminal, whole at 80 columns.

All text of a record becomes ``Text``: in a string Rich would read ``[bold]`` as markup.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from sparsegrad_cli.io.untrusted_text import printable_text
from sparsegrad_cli.report.access import dig, items, text
from sparsegrad_cli.report.budget_tables import budget_flags, budget_table, plan_tables
from sparsegrad_cli.report.compare_record import (
    difference_cell,
    reference_of,
    rows_of,
    seeds_remark,
    tasks_of,
)
from sparsegrad_cli.report.compare_tables import method_table, note_cell, overview_table
from sparsegrad_cli.report.estimate_tables import estimate_notes, estimate_tables
from sparsegrad_cli.report.export_tables import export_facts, export_subtitle, export_title
from sparsegrad_cli.report.judge_tables import (
    judge_failures,
    judge_scores,
    judge_subtitle,
    judge_title,
)
from sparsegrad_cli.report.labels import error_lines, status_of, status_words
from sparsegrad_cli.report.parity_tables import check_lines
from sparsegrad_cli.report.record_tables import (
    calibration_facts,
    energy_by_kind,
    spectra_table,
    support_energy,
)
from sparsegrad_cli.report.reference_results import figures_table
from sparsegrad_cli.report.run_tables import (
    facts,
    memory_table,
    notes_of,
    subtitle,
    time_line,
    title_of,
)
from sparsegrad_cli.report.tables import Fact
from sparsegrad_cli.report.terminal_tables import drawn
from sparsegrad_cli.report.tuning_tables import tuning_lines, tuning_table
from sparsegrad_cli.report.units import format_seconds
from sparsegrad_cli.report.verdicts import verdict_lines

_STATUS_STYLE = {"done": "green", "failed": "red", "out_of_memory": "red"}
_MOST_SPECTRA = 8
_MOST_NOTES = 6
_CHECKS = {True: ("✓", "green"), False: ("✗", "bold red"), None: ("·", "dim")}


def plain_line(raw: str, style: str = "") -> Text:
    """One line that may name files: no markup, and nothing that a terminal obeys."""
    return Text(printable_text(raw).replace("\n", "\N{SYMBOL FOR NEWLINE}"), style=style)


def run_table(run: dict[str, Any]) -> RenderableType:
    """A training run: headline figures, memory by phase and category, time by phase."""
    parts: list[RenderableType] = [*_heading(run), _facts(facts(run))]
    parts.append(drawn(memory_table(run)) or Text("Memory: not recorded", style="dim"))
    parts.append(_labelled("Time", time_line(run) or "not recorded"))
    energy = support_energy(run) or energy_by_kind(run)
    if energy:
        parts += [Text(), drawn(energy) or Text()]
    return Group(*parts, *_notes(notes_of(run)))


def calibration_table(run: dict[str, Any]) -> RenderableType:
    """A calibration run: its cost, energy in the top entries, how fast the spectra fall."""
    parts: list[RenderableType] = _heading(run)
    shown = calibration_facts(run)
    parts.append(_facts(shown) if shown else Text("Calibration: not recorded", style="dim"))
    missing = Text("Energy: not recorded", style="dim")
    parts.append(drawn(support_energy(run) or energy_by_kind(run)) or missing)
    spectra = spectra_table(run)
    if spectra is not None:
        more = len(spectra.rows) - _MOST_SPECTRA
        notes = [f"and {more} more in the report"] if more > 0 else []
        parts.append(drawn(replace(spectra, rows=spectra.rows[:_MOST_SPECTRA], notes=notes)) or "")
    parts.append(_labelled("Time", time_line(run) or "not recorded"))
    return Group(*parts, *_notes(notes_of(run)))


def compare_table(compare: dict[str, Any]) -> RenderableType:
    """A comparison: one row a method and task, what they mean, and whether it was fair."""
    parts: list[RenderableType] = _heading(compare)
    for task in tasks_of(compare):
        table = method_table(compare, task)
        if table is None:
            parts.append(Text(f"{task}: no rows recorded", style="dim"))
            continue
        parts += [drawn(replace(table, notes=())) or "", *_below(compare, task)]
    budget = budget_table(compare)
    if budget is not None:  # the report says the rest
        budget = replace(budget, notes=budget_flags(compare))
    for extra in (overview_table(compare), figures_table(compare), budget):
        if extra is not None:
            parts += [drawn(extra) or ""]
    tuned = tuning_table(compare)
    if tuned is not None:
        lines = tuning_lines(compare)
        parts += [drawn(replace(tuned, notes=lines).without("space")) or ""]
    parts += [Text(), *(Text(line) for line in verdict_lines(compare)), Text()]
    for held, line in check_lines(compare):
        mark, style = _CHECKS[held]
        parts.append(Text(f"{mark} {line}", style=style))
    return Group(*parts)


def plan_table(plan: dict[str, Any]) -> RenderableType:
    """What a comparison would run, and under which budget."""
    return Group(*(drawn(table) or "" for table in plan_tables(plan)))


def estimate_table(record: dict[str, Any]) -> RenderableType:
    """An estimate: a row a method, the largest batches, and what was supposed."""
    parts = [drawn(table) or "" for table in estimate_tables(record)]
    lines = [Text(f"- {line}", style="dim") for line in estimate_notes(record)]
    took = format_seconds(dig(record, "seconds"))
    return Group(*parts, Text(), Text("Supposed", style="italic"), *lines, _labelled("took", took))


def export_table(record: dict[str, Any]) -> RenderableType:
    """An export: how alike it answers, what was lost, how to load it."""
    return Group(
        Text(),
        Text.assemble((export_title(record), "bold"), "  ", ("checked", "green")),
        Text(export_subtitle(record), style="dim"),
        Text(),
        _facts(export_facts(record)),
        _labelled("load", text(record, "load") or "not recorded"),
        *_notes([note for note in map(text, items(record, "notes")) if note]),
    )


def judge_table(record: dict[str, Any]) -> RenderableType:
    """Grades or wins by model and category; what failed, below."""
    head = Text.assemble((judge_title(record), "bold"), "  ")
    status = text(record, "status") or "?"
    head.append(status, style=_STATUS_STYLE.get(status, "yellow"))
    parts: list[RenderableType] = [Text(), head, Text(judge_subtitle(record), style="dim")]
    parts.append(drawn(judge_scores(record)) or "")
    failures = [_labelled("failed", line, "red") for line in judge_failures(record)]
    return Group(*parts, *failures)


def _below(compare: Any, task: str) -> list[RenderableType]:
    """Differences, then what is odd about a row: under the table, where there is room."""
    rows = rows_of(compare, task)
    lines: list[RenderableType] = []
    shown = [
        f"{text(row, 'method')} {difference_cell(row)}" for row in rows if difference_cell(row)
    ]
    if shown:
        against = _labelled(f"against {reference_of(rows)}", ", ".join(shown))
        remark = seeds_remark(rows)
        lines.append(Text.assemble(against, (f"; {remark}" if remark else "", "dim")))
    for row in rows:
        note = note_cell(row)
        if note:
            lines.append(_labelled(text(row, "method") or "?", note))
    return [*lines, Text()]


def _heading(record: Any) -> list[RenderableType]:
    status = status_of(record)
    head = Text.assemble((title_of(record), "bold"), "  ")
    head.append(status_words(status), style=_STATUS_STYLE.get(status, "yellow"))
    lines: list[RenderableType] = [Text(), head]
    if subtitle(record):
        lines.append(Text(subtitle(record), style="dim"))
    for label, value in error_lines(record.get("error")):
        lines.append(_labelled(label, value, "red" if label == "what" else ""))
    return [*lines, Text()]


def _labelled(label: str, value: str, style: str = "") -> Text:
    return Text.assemble((f"{label}  ", "dim"), (value, style))


def _facts(shown: Sequence[Fact]) -> RenderableType:
    grid = RichTable.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True, justify="right")
    grid.add_column(style="dim", overflow="fold")
    for fact in shown:
        grid.add_row(Text(fact.label), Text(fact.value, style="bold"), Text(fact.detail))
    return grid


def _notes(notes: Sequence[str]) -> list[RenderableType]:
    shown: list[RenderableType] = [_labelled("note", note) for note in notes[:_MOST_NOTES]]
    if len(notes) > _MOST_NOTES:
        shown.append(Text(f"and {len(notes) - _MOST_NOTES} more notes in the report", style="dim"))
    return shown
