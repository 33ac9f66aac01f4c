"""Print what a command returns: JSON for programs, a screen for people, or an error. No torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from sparsegrad_cli import distributed
from sparsegrad_cli.errors import Problem, RecipeError, SparsegradError
from sparsegrad_cli.io.untrusted_text import printable_line, printable_text

if TYPE_CHECKING:
    from pathlib import Path

    from sparsegrad_cli.records.study import StudyRecord
    from sparsegrad_cli.report.document import Document

DEBUG_FLAG = "--debug"
_MOST, _END = 2000, 500  # characters shown of a long part of an error, and of its end


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
    from sparsegrad_cli.report.terminal import plain_line, screen

    console = Console()
    console.print(screen(document), crop=False)  # Commands to copy may be wider.
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
    from sparsegrad_cli.judge.verdicts import read_graded_answers
    from sparsegrad_cli.records.store import load_study
    from sparsegrad_cli.report.render import write_study_report

    study = load_study(folder) if study is None else study
    write_study_report(folder, study, read_graded_answers(folder, study))
    return study


# --- errors


def run_guarded(app: Callable[..., Any]) -> int:
    """Run a Typer app and return its exit code."""
    debug = DEBUG_FLAG in sys.argv[1:]
    try:
        app()
    except SystemExit as ended:  # Typer prints its usage errors itself and exits
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except SparsegradError as error:
        if debug:
            raise
        show_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        Console(stderr=True).print("Interrupted.")
        return 130
    except BrokenPipeError:
        return 1
    except Exception as error:
        if debug:
            raise
        show_error(
            SparsegradError(
                f"{type(error).__name__}: {error}",
                fix=f"this error was not expected; run again with {DEBUG_FLAG} for the traceback",
            )
        )
        return 1
    return 0


def show_error(error: SparsegradError) -> None:
    """Print what is wrong, where, and what to do."""
    console = Console(stderr=True, highlight=False)
    colour = "yellow" if error.exit_code == 130 else "red"
    body = Text()
    if isinstance(error, RecipeError):
        for number, problem in enumerate(error.problems):
            body.append("\n" if number else "")
            _append_problem(body, problem)
    else:
        body.append(_printable(error.what.strip()))
        for line in error.more:
            body.append(_printable(f"\n{line}"))
        if error.where:
            body.append(_printable(f"\nwhere  {error.where}"), style="dim")
        if error.fix:
            body.append(_printable(f"\nfix    {error.fix}"), style="bold")
    several = f" (process {distributed.rank()})" if distributed.world_size() > 1 else ""
    title = error.title + several
    console.print(Panel(body, title=title, title_align="left", border_style=colour))


def _printable(text: str) -> str:
    """Return text that may quote files and servers, without control characters.

    The middle of a long text is left out, because the reason often comes last.
    """
    long = len(text) > _MOST
    return printable_text(f"{text[: _MOST - _END]}…{text[-_END:]}" if long else text)


def _append_problem(body: Text, problem: Problem) -> None:
    place = problem.file or ""
    if problem.line is not None:
        place += f":{problem.line}"
    if place:
        body.append(f"{printable_line(place)}  ", style="dim")
    body.append(printable_line(problem.key), style="bold")
    body.append(f"  {_printable(problem.what)}")
    if problem.fix:
        body.append(_printable(f"\n    {problem.fix}"), style="bold")
