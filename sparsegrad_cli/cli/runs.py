"""``sparsegrad train``, ``calibrate`` and ``report``."""

from __future__ import annotations

from collections.abc import Callable
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
from sparsegrad_cli.cli.output import report_line, rewrite_study_report, show
from sparsegrad_cli.cli.progress import make_observer
from sparsegrad_cli.errors import DiskError, UsageError
from sparsegrad_cli.io.paths import is_folder

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


def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run or a comparison.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show a run or a comparison, and write its reports (HTML, Markdown and LaTeX) again."""
    from sparsegrad_cli.io.locks import owner_of
    from sparsegrad_cli.records.run import RunRecord
    from sparsegrad_cli.records.store import load_run_or_study
    from sparsegrad_cli.report.render import write_run_report
    from sparsegrad_cli.report.study import study_screen
    from sparsegrad_cli.run.folder import with_current_status
    from sparsegrad_cli.study.evidence import up_to_date

    folder = run if is_folder(run) else run.parent
    found = load_run_or_study(run)
    if isinstance(found, RunRecord):
        record = with_current_status(found, folder)
        footer = _written(folder, lambda: write_run_report(folder, record))
        _show_run(record.changed(output_dir=str(folder)), as_json=as_json, footer=footer)
        return
    study = up_to_date(found, running=owner_of(folder) is not None)
    footer = _written(folder, lambda: rewrite_study_report(folder, study))
    content = study.to_json() | {"output_dir": str(folder)}
    show(content, study_screen(study), as_json=as_json, footer=footer)


def _written(folder: Path, write: Callable[[], object]) -> str | None:
    """Write the report files, and return the line that names them.

    A folder that cannot be written, such as another user's, can still be read: then a note on
    stderr says why there are no files, and the report is shown.
    """
    try:
        write()
    except DiskError as error:
        with make_observer(quiet=False) as observer:
            observer.note(f"the report is shown, but its files were not written: {error.what}")
        return None
    return report_line(folder)


def _show_run(run: RunRecord, *, as_json: bool, footer: str | None) -> None:
    from sparsegrad_cli.report.run import run_screen

    content = run.to_json() | {"output_dir": str(Path(run.output_dir or ""))}
    show(content, run_screen(run), as_json=as_json, footer=footer)
