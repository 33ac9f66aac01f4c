"""The reports of a comparison: one page while it runs, and all forms of it at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sparsegrad_cli.report.compare_page import Drawings, is_alive, write_compare_html
from sparsegrad_cli.report.latex import compare_latex
from sparsegrad_cli.report.markdown import compare_markdown
from sparsegrad_cli.report.records import write_text_atomic


def write_reports(
    compare: Mapping[str, Any], folder: Path, drawings: Drawings | None = None
) -> None:
    """Write report.html, report.md and report.tex of one record, the same numbers in each.

    Raises:
        DiskError: a file could not be written.
    """
    write_compare_html(compare, folder / "report.html", drawings)
    write_text_atomic(folder / "report.md", compare_markdown(compare))
    write_text_atomic(folder / "report.tex", compare_latex(compare))


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

    def __call__(self, compare: Mapping[str, Any]) -> None:
        if not is_alive(compare):
            write_reports(compare, self._folder, self._drawings)
            return
        try:
            write_compare_html(compare, self._folder / "report.html", self._drawings)
        except Exception as error:
            if not self._told:
                self._tell(f"the live report could not be written: {error}")
            self._told = True
