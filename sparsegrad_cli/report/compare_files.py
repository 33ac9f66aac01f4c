"""The report of a comparison, in its folder: tables and charts, and answers if there are any."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsegrad_cli.report.answers_record import load_answers
from sparsegrad_cli.report.html import write_compare_html
from sparsegrad_cli.report.markdown import compare_markdown
from sparsegrad_cli.report.records import write_text_atomic


def write_compare_report(folder: Path, record: Mapping[str, Any]) -> None:
    """Write ``report.html`` and ``report.md``.

    Args:
        folder: of the comparison.
        record: its compare.json; anything may be missing.

    Raises:
        DiskError: a file could not be written.
    """
    answers = load_answers(folder, record)
    write_text_atomic(folder / "report.md", compare_markdown(record, answers))
    write_compare_html(record, folder / "report.html", answers)
