"""train, calibrate, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

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


def train(
    recipe: RecipeAndOverrides = None,
    output_dir: OutputDir = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last checkpoint in output_dir.")
    ] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Fine-tune by a recipe: calibrate if the method needs it, train, evaluate, report.

    Without a recipe: SparseGrad on a built-in acceptability task with a built-in BERT.

    [bold]sparsegrad train configs/roberta_glue.yaml task.name=glue/rte seed=3705[/bold]
    """
    from sparsegrad_cli.report.terminal import run_table
    from sparsegrad_cli.training.train import train as train_recipe

    loaded = load(recipe, output_dir)
    if resume and loaded.recipe.output_dir is None:
        raise UsageError(
            "--resume needs to know which run",
            fix="sparsegrad train runs/NAME --resume",
        )
    if resume and overwrite:
        raise UsageError("--resume and --overwrite exclude each other")
    with _observer(quiet or as_json) as observer:
        record = train_recipe(loaded, observer, resume=resume, overwrite=overwrite)
    distributed.shutdown()
    _show(record.to_json(), run_table, as_json)


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
    from sparsegrad_cli.report.terminal import calibration_table

    loaded = load(recipe, output_dir)
    with _observer(quiet or as_json) as observer:
        record = calibrate_run(loaded, observer, overwrite=overwrite)
    distributed.shutdown()
    _show(record.to_json(), calibration_table, as_json)


def report(
    run: Annotated[Path, typer.Argument(help="A run or comparison folder.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show a run or a comparison again, and write its HTML, Markdown and LaTeX anew."""
    from sparsegrad_cli.records.store import load_record, write_text_atomic
    from sparsegrad_cli.report.compare_files import write_compare_report
    from sparsegrad_cli.report.html import write_run_html
    from sparsegrad_cli.report.markdown import run_markdown
    from sparsegrad_cli.report.terminal import calibration_table, compare_table, run_table
    from sparsegrad_cli.run.folder import as_it_is
    from sparsegrad_cli.study.evidence import up_to_date

    folder = run if is_folder(run) else run.parent
    record = as_it_is(load_record(run), folder)
    if "cells" in record:
        record = up_to_date(record)
        write_compare_report(folder, record)
        _show({**record, "output_dir": str(folder)}, compare_table, as_json)
        return
    write_run_html(record, folder / "report.html")
    write_text_atomic(folder / "report.md", run_markdown(record))
    table = calibration_table if record.get("command") == "calibrate" else run_table
    _show({**record, "output_dir": str(folder)}, table, as_json)


def _observer(quiet: bool) -> Any:
    from sparsegrad_cli.cli.progress import ProgressObserver, QuietObserver

    return QuietObserver() if quiet or not distributed.is_rank_zero() else ProgressObserver()


def _show(record: dict[str, Any], table: Any, as_json: bool) -> None:
    if not distributed.is_rank_zero():
        return
    if as_json:
        typer.echo(json.dumps(record))
        return
    from rich.console import Console

    from sparsegrad_cli.report.terminal import plain_line

    console = Console()
    console.print(table(record))
    console.print(plain_line(f"Report: {Path(record['output_dir']) / 'report.html'}"))
