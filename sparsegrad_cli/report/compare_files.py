"""The report of a comparison, in its folder: tables and charts, and answers if there are any.

One page while the comparison runs, and all forms of it at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sparsegrad_cli.records.store import write_text_atomic
from sparsegrad_cli.report.answers_record import load_answers
from sparsegrad_cli.report.compare_page import Drawings, is_alive, write_compare_html
from sparsegrad_cli.report.latex import compare_latex
from sparsegrad_cli.report.markdown import compare_markdown


def write_compare_report(
    folder: Path, record: Mapping[str, Any], drawings: Drawings | None = None
) -> None:
    """Write ``report.html``, ``report.md`` and ``report.tex``, the same numbers in each.

    Args:
        folder: of the comparison.
        record: its compare.json; anything may be missing.
        drawings: what was drawn for the page before.

    Raises:
        DiskError: a file could not be written.
    """
    answers = load_answers(folder, record)
    write_text_atomic(folder / "report.md", compare_markdown(record, answers))
    write_text_atomic(folder / "report.tex", compare_latex(record))
    write_compare_html(record, folder / "report.html", answers, drawings)


class LiveReport:
    """Called each time compare.json was written: the page while it runs, everything at the end.

    A study of hours does not end for a page that cannot be drawn while it runs: that is told once.
    The reports at the end are another matter.

    Args:
        folder: the comparison's.
        tell: called with the one line.
    """

    def __init__(self, folder: Path, tell: Callable[[str], None]) -> None:
        self._folder, self._tell = folder, tell
        self._drawings = Drawings()
        self._told = False

    def __call__(self, record: Mapping[str, Any]) -> None:
        if not is_alive(record):
            write_compare_report(self._folder, record, self._drawings)
            return
        page = self._folder / "report.html"
        try:
            answers = load_answers(self._folder, record)
            write_compare_html(record, page, answers, self._drawings)
        except Exception as error:
            if not self._told:
                self._tell(f"the live report could not be written: {error}")
            self._told = True
