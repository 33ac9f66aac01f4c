"""Records as GitHub Markdown. Scores are printed times 100 with one decimal, as in the paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparsegrad_cli.report.access import mappings, text
from sparsegrad_cli.report.answers_page import answers_markdown
from sparsegrad_cli.report.answers_record import SideBySide
from sparsegrad_cli.report.budget_tables import budget_table
from sparsegrad_cli.report.cell_tables import failures_table
from sparsegrad_cli.report.compare_record import tasks_of
from sparsegrad_cli.report.compare_tables import overview_table, score_table
from sparsegrad_cli.report.cost_tables import calibration_costs, counters_table
from sparsegrad_cli.report.labels import error_lines, status_of, status_words
from sparsegrad_cli.report.parity_tables import check_lines, parity_table
from sparsegrad_cli.report.record_tables import (
    calibration_facts,
    energy_by_kind,
    energy_by_target,
    provenance,
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
from sparsegrad_cli.report.tables import Fact, Table, escape_markdown, table_markdown
from sparsegrad_cli.report.tuning_tables import tuning_table
from sparsegrad_cli.report.verdicts import pairs_table, verdict_lines

_SCALE = "Scores are times 100, with one decimal."


def run_markdown(run: Mapping[str, Any]) -> str:
    """A training or calibration run."""
    parts = _heading(run)
    calibrates = text(run, "command") == "calibrate"
    if not calibrates:
        parts += [_SCALE, _facts("Figures", facts(run))]
        parts.append(_or_absent("Memory", memory_table(run)))
    parts.append(f"Time: {escape_markdown(time_line(run) or 'not recorded')}.")
    calibration = calibration_facts(run)
    if calibration or calibrates:
        parts.append("## Calibration")
        parts.append(_facts("Cost", calibration) if calibration else "Not recorded.")
        tables = (
            support_energy(run),
            energy_by_kind(run),
            energy_by_target(run),
            spectra_table(run),
        )
        for table in tables:
            if table:
                parts += [table_markdown(table), *map(escape_markdown, table.notes)]
    notes = notes_of(run)
    if notes:
        parts.append("\n".join(["## Notes", "", *(f"- {escape_markdown(n)}" for n in notes)]))
    return _join([*parts, "## Provenance", table_markdown(provenance(run))])


def compare_markdown(compare: Mapping[str, Any], answers: Sequence[SideBySide] = ()) -> str:
    """A comparison: what the tests show, tables by task, answers side by side, failures, checks."""
    cells = mappings(compare, "cells")
    done = sum(status_of(cell) == "done" for cell in cells)
    parts = [*_heading(compare), f"{done} of {len(cells)} cells done. {_SCALE}"]
    overview = overview_table(compare)
    parts += [escape_markdown(line) for line in verdict_lines(compare)]
    parts += [table_markdown(overview)] if overview else []
    budget = budget_table(compare)
    parts += [table_markdown(budget)] if budget else []
    for task in tasks_of(compare):
        parts.append(_or_absent(task, score_table(compare, task)))
        for costs in (counters_table(compare, task), calibration_costs(compare, task)):
            parts += [table_markdown(costs)] if costs else []
    parts += [answers_markdown(each, alone=len(answers) == 1) for each in answers]
    makers = (pairs_table, tuning_table, figures_table, failures_table)
    for table in [make(compare) for make in makers]:
        parts += [table_markdown(table)] if table else []
    marks = {True: "yes", False: "**NO**", None: "unknown"}
    lines = [f"- {marks[held]}: {escape_markdown(line)}" for held, line in check_lines(compare)]
    parts.append("\n".join(["## Was it fair?", "", *lines]))
    parity = parity_table(compare)
    parts += [table_markdown(parity)] if parity else []
    return _join([*parts, "## Provenance", table_markdown(provenance(compare))])


def _heading(record: Mapping[str, Any]) -> list[str]:
    parts = [f"# {escape_markdown(title_of(record))}"]
    line = subtitle(record)
    parts += [escape_markdown(line)] if line else []
    parts.append(f"Status: **{escape_markdown(status_words(status_of(record)))}**")
    error = error_lines(record.get("error"))
    if error:
        parts.append("\n".join(f"- {label}: {escape_markdown(value)}" for label, value in error))
    return parts


def _facts(caption: str, shown: Sequence[Fact]) -> str:
    rows = [(fact.label, fact.value, fact.detail) for fact in shown]
    return table_markdown(Table(caption, ("figure", "value", "read against"), rows, prose=1))


def _or_absent(name: str, table: Table | None) -> str:
    return table_markdown(table) if table else f"{escape_markdown(name)}: not recorded."


def _join(parts: Sequence[str]) -> str:
    return "\n\n".join(parts) + "\n"
