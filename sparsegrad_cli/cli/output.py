"""Print the result of a command: JSON for programs, a screen for people. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import typer

from sparsegrad_cli import distributed

if TYPE_CHECKING:
    from pathlib import Path

    from sparsegrad_cli.records.study import StudyRecord
    from sparsegrad_cli.report.document import Document


def show(
    content: Mapping[str, Any], document: Document, *, as_json: bool, footer: str | None = None
) -> None:
    """Print a result on standard output, once among several processes.

    Args:
        content: What ``--json`` prints.
        document: What is shown otherwise.
        as_json: Whether ``--json`` was given.
        footer: A last line below the document, which may name files.
    """
    if not distributed.is_rank_zero():
        return
    if as_json:
        typer.echo(json.dumps(content))
        return
    from rich.console import Console

    from sparsegrad_cli.report.terminal import plain_line, screen

    console = Console()
    console.print(screen(document))
    if footer is not None:
        console.print(plain_line(footer))


def report_line(folder: Path) -> str:
    """Return the line that says where the HTML report of a run or comparison is."""
    return f"Report: {folder / 'report.html'}"


def rewrite_study_report(folder: Path, study: StudyRecord | None = None) -> StudyRecord:
    """Write the reports of a comparison with the answers and grades in its folder.

    Args:
        folder: The folder of the comparison.
        study: Its record; None reads it from the folder.

    Returns:
        The record.
    """
    from sparsegrad_cli.judge.grades import read_graded_answers
    from sparsegrad_cli.records.store import load_study
    from sparsegrad_cli.report.files import write_study_report

    study = load_study(folder) if study is None else study
    write_study_report(folder, study, read_graded_answers(folder, study))
    return study
