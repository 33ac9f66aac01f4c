"""train, calibrate, report."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsegrad_cli import distributed
from sparsegrad_cli.cli.arguments import (
    Debug,
    Json,
    OutputDir,
    Overwrite,
    Quiet,
    RecipeAndOverrides,
    load,
)
from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.io.paths import is_folder

if TYPE_CHECKING:
    from sparsegrad_cli.records.base import Record
    from sparsegrad_cli.records.run import RunRecord
    from sparsegrad_cli.report.document import Document


def train(
    recipe: RecipeAndOverrides = None,
    output_dir: OutputDir = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last checkpoint in output_dir.")
    ] = False,
    overwrite: Overwrite = False,
    managed: Annotated[bool, typer.Option("--managed", hidden=True)] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Fine-tune by a recipe: calibrate if the method needs it, train, evaluate, report.

    Without a recipe: SparseGrad on a built-in acceptability task with a built-in BERT.

    [bold]sparsegrad train configs/roberta_glue.yaml task.name=glue/rte seed=3705[/bold]
    """
    from sparsegrad_cli.training.train import train as train_recipe

    loaded = load(recipe, output_dir)
    if resume and loaded.recipe.output_dir is None:
        raise UsageError(
            "--resume needs to know which run",
            fix="sparsegrad train runs/NAME --resume",
        )
    if resume and overwrite:
        raise UsageError("--resume and --overwrite exclude each other")
    with ExitStack() as held, _observer(quiet or as_json) as observer:
        if managed:  # started by `compare`
            from sparsegrad_cli.study.runs import managed as managed_run

            resume = held.enter_context(managed_run(loaded, observer.note))
            overwrite = not resume
        record = train_recipe(loaded, observer, resume=resume, overwrite=overwrite)
    distributed.shutdown()
    _show_run(record, as_json)


def calibrate(
    recipe: RecipeAndOverrides = None,
    output_dir: OutputDir = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Make the basis of a recipe from a few gradient steps, and show what it is worth."""
    from sparsegrad_cli.calibration.calibrate_run import calibrate_run

    loaded = load(recipe, output_dir)
    with _observer(quiet or as_json) as observer:
        record = calibrate_run(loaded, observer, overwrite=overwrite)
    distributed.shutdown()
    _show_run(record, as_json)


def report(
    run: Annotated[Path, typer.Argument(help="A run or comparison folder.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show a run or a comparison again, and rewrite its reports (HTML, Markdown and LaTeX)."""
    from sparsegrad_cli.io.locks import owner_of
    from sparsegrad_cli.judge.grades import read_graded_answers
    from sparsegrad_cli.records.run import RunRecord
    from sparsegrad_cli.records.store import load_run_or_study
    from sparsegrad_cli.report.files import write_run_report, write_study_report
    from sparsegrad_cli.report.study import study_screen
    from sparsegrad_cli.run.folder import with_current_status
    from sparsegrad_cli.study.evidence import up_to_date

    folder = run if is_folder(run) else run.parent
    found = load_run_or_study(run)
    if isinstance(found, RunRecord):
        found = with_current_status(found, folder)
        write_run_report(folder, found)
        _show_run(found.changed(output_dir=str(folder)), as_json)
        return
    study = up_to_date(found, running=owner_of(folder) is not None)
    write_study_report(folder, study, read_graded_answers(folder, study))
    _show(study, study_screen(study), folder, as_json)


def _observer(quiet: bool) -> Any:
    from sparsegrad_cli.cli.progress import ProgressObserver, QuietObserver

    return QuietObserver() if quiet or not distributed.is_rank_zero() else ProgressObserver()


def _show_run(run: RunRecord, as_json: bool) -> None:
    from sparsegrad_cli.report.run import run_screen

    _show(run, run_screen(run), Path(run.output_dir or ""), as_json)


def _show(record: Record, document: Document, folder: Path, as_json: bool) -> None:
    """Print a record, and where its report lies."""
    if not distributed.is_rank_zero():
        return
    if as_json:
        typer.echo(json.dumps(record.to_json() | {"output_dir": str(folder)}))
        return
    from rich.console import Console

    from sparsegrad_cli.report.terminal import plain_line, screen

    console = Console()
    console.print(screen(document))
    console.print(plain_line(f"Report: {folder / 'report.html'}"))
