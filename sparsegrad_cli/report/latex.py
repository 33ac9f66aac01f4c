"""Tables as LaTeX: for a document that loads booktabs, and nothing else."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from sparsegrad_cli.report.access import text
from sparsegrad_cli.report.budget_tables import budget_table
from sparsegrad_cli.report.compare_record import tasks_of
from sparsegrad_cli.report.compare_tables import overview_table, score_table
from sparsegrad_cli.report.cost_tables import calibration_costs, counters_table
from sparsegrad_cli.report.parity_tables import check_lines, parity_table
from sparsegrad_cli.report.reference_results import figures_table
from sparsegrad_cli.report.run_tables import title_of
from sparsegrad_cli.report.tables import Table
from sparsegrad_cli.report.tuning_tables import tuning_table
from sparsegrad_cli.report.units import NOT_RECORDED
from sparsegrad_cli.report.verdicts import pairs_table, verdict_lines

_ESCAPES = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "\u00a0": "~",
    "\u2212": "$-$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    "–": "--",
    "·": r"$\cdot$",
}
_LAST_LATIN = 0x17F  # what every engine's default fonts have, UTF-8 being the default input
_HELD = {True: "Held", False: "DID NOT HOLD", None: "Not known"}
_HEAD_WIDTH = 14  # characters of a header's line
_WIDE = 7  # columns; more are set smaller


def escape_latex(raw: str) -> str:
    """Text that stays text: no command, comment, column or mathematics begins.

    Characters beyond the Latin scripts, which pdfTeX's fonts lack, are named: ``U+4E2D``.
    """
    one_line = " ".join(raw.replace("\u00a0", "\0").split()).replace("\0", "\u00a0")
    return "".join(_ESCAPES.get(c) or _plain(c) for c in one_line)


def _plain(character: str) -> str:
    code = ord(character)
    fits = code <= _LAST_LATIN and not 0x7F <= code < 0xA0 and code >= 0x20
    return character if fits else f"U+{code:04X}"


def table_latex(table: Table) -> str:
    """A ``table`` environment with caption, booktabs rules and notes."""
    columns = range(len(table.header))
    kinds = "".join("l" if table.is_words(c) else "r" for c in columns)
    head = " & ".join(_head(name, kinds[c]) for c, name in enumerate(table.header))
    size = r"\scriptsize\setlength{\tabcolsep}{3pt}" if len(kinds) > _WIDE else r"\small"
    lines = [
        r"\begin{table}[htbp]",
        r"\centering",
        rf"\caption{{{escape_latex(table.caption)}}}",
        size,
        rf"\begin{{tabular}}{{{kinds}}}",
        r"\toprule",
        rf"{head} \\",
        r"\midrule",
        *(_line(table, number) for number in range(len(table.rows))),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    lines += [rf"\par\smallskip {{\footnotesize {escape_latex(note)}}}" for note in table.notes]
    return "\n".join([*lines, r"\end{table}"])


def _head(name: str, kind: str) -> str:
    parts = textwrap.wrap(name.replace("\n", " "), _HEAD_WIDTH, break_long_words=False) or [""]
    lines = r"\\".join(_guarded(escape_latex(part)) for part in parts)
    return lines if len(parts) == 1 else rf"\shortstack[{kind}]{{{lines}}}"


def _line(table: Table, number: int) -> str:
    cells = [escape_latex(NOT_RECORDED if c is None else c) for c in table.rows[number]]
    shown = [
        rf"\textbf{{{cell}}}" if (number, at) in table.strong else cell
        for at, cell in enumerate(cells)
    ]
    return rf"{_guarded(' & '.join(shown))} \\"


def _guarded(line: str) -> str:
    """After a line break TeX reads [ as its length and * as its variant."""
    return "{}" + line if line[:1] in ("[", "*") else line


def compare_latex(compare: Mapping[str, Any]) -> str:
    """``report.tex`` of a comparison: the tables of ``report.md``, the tests, what was fair."""
    name, finished = escape_latex(title_of(compare)), escape_latex(text(compare, "finished") or "")
    head = f"% {name} {finished}, by sparsegrad: \\input it where booktabs is loaded"
    tables: list[Table | None] = [overview_table(compare), budget_table(compare)]
    for task in tasks_of(compare):
        tables += [make(compare, task) for make in (score_table, counters_table, calibration_costs)]
    tables += [pairs_table(compare), tuning_table(compare), figures_table(compare)]
    tables.append(parity_table(compare))
    drawn = [table_latex(table) for table in tables if table is not None]
    words = [escape_latex(line) for line in verdict_lines(compare)]
    fair = [_guarded(escape_latex(f"{_HELD[held]}: {line}")) for held, line in check_lines(compare)]
    return "\n\n".join([head, *drawn, *words, *fair]) + "\n"
