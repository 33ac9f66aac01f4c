"""``sparsegrad train`` and ``calibrate``."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
from sparsegrad_cli.cli.output import report_line, show
from sparsegrad_cli.cli.progress import make_observer
from sparsegrad_cli.errors import UsageError

if TYPE_CHECKING:
    from sparsegrad_cli.records.run import RunRecord

Resume = Annotated[
    bool, typer.Option("--resume", help="Continue from the last checkpoint of the run.")
]
# `compare` starts its runs with this option.
Managed = Annotated[bool, typer.Option("--managed", hidden=True)]


def train(
    recipe: RecipeAndOverrides = None,
    output_dir: OutputDir = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    managed: Managed = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Run a recipe: calibrate if the method needs it, train, evaluate and report.

    Without a recipe, SparseGrad trains a built-in BERT on a built-in acceptability task.

    [bold]sparsegrad train configs/roberta_glue.yaml task.name=glue/rte seed=3705[/bold]
    """
    from sparsegrad_cli.training.train import train as train_recipe

    loaded = load(recipe, output_dir)
    if resume and loaded.recipe.output_dir is None:
        raise UsageError(
            "--resume needs to know which run to continue",
            where="command line",
            fix="sparsegrad train runs/NAME --resume",
        )
    if resume and overwrite:
        raise UsageError(
            "--resume and --overwrite exclude each other",
            where="command line",
            fix="--resume continues the run, and --overwrite starts again",
        )
    with ExitStack() as held, make_observer(quiet or as_json) as observer:
        if managed:
            from sparsegrad_cli.study.runs import managed as managed_run

            resume = held.enter_context(managed_run(loaded, observer.note))
            overwrite = not resume
        record = train_recipe(loaded, observer, resume=resume, overwrite=overwrite)
    distributed.shutdown()
    _show_run(record, as_json=as_json, footer=report_line(Path(record.output_dir or "")))


def calibrate(
    recipe: RecipeAndOverrides = None,
    output_dir: OutputDir = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compute the basis of a recipe from a few gradient steps, and show how good it is."""
    from sparsegrad_cli.calibration.calibrate_run import calibrate_run

    loaded = load(recipe, output_dir)
    with make_observer(quiet or as_json) as observer:
        record = calibrate_run(loaded, observer, overwrite=overwrite)
    distributed.shutdown()
    _show_run(record, as_json=as_json, footer=report_line(Path(record.output_dir or "")))


def _show_run(run: RunRecord, *, as_json: bool, footer: str | None) -> None:
    from sparsegrad_cli.report.run import run_screen

    content = run.to_json() | {"output_dir": str(Path(run.output_dir or ""))}
    show(content, run_screen(run), as_json=as_json, footer=footer)
