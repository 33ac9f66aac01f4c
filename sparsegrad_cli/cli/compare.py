"""compare."""

from __future__ import annotations

import json
import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparsegrad_cli.cli.arguments import (
    Debug,
    Device,
    Json,
    Quiet,
    RecipeAndOverrides,
    refuse_without_effect,
    split_arguments,
)
from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.io.paths import from_here

if TYPE_CHECKING:
    from rich.console import Console

    from sparsegrad_cli.recipe.study import LoadedStudy
    from sparsegrad_cli.records.study import StudyRecord
    from sparsegrad_cli.study.folder import StudyFolder


class Engine(StrEnum):
    """Where the runs of a study train."""

    local = "local"
    slurm = "slurm"
    ray = "ray"


def compare(
    recipe: RecipeAndOverrides = None,
    methods: Annotated[
        str | None,
        typer.Option("--methods", "-m", help="Comma-separated: full, lora, meprop, sparsegrad."),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option("--seeds", "-n", min=1, help="Number of seeds; 2 by default.")
    ] = None,
    tune: Annotated[
        int | None,
        typer.Option("--tune", min=2, help="Tuning trials for each method, before its runs."),
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", "-o", help="runs/compare-<name> by default.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Repeat all runs, finished ones too.")
    ] = False,
    engine: Annotated[
        Engine | None,
        typer.Option(
            "--engine",
            help="Where runs train: processes here, Slurm jobs, or Ray tasks. Its settings are "
            "keys such as engine.slurm.partition=gpu. A study's own by default, else local.",
            show_default=False,
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs",
            "-j",
            min=1,
            help="Runs at once. Local ones share the cores and have a GPU each; 1 by default, "
            "32 on a cluster.",
            show_default=False,
        ),
    ] = None,
    match: Annotated[
        str | None,
        typer.Option(
            "--match",
            help="What all methods have in common: trainable (parameters, by the recipe's "
            "density), a budget that sizes are solved for (trainable=70k, optimizer_state=64MiB, "
            "peak=2GiB), or none. A study's own by default.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        Device | None,
        typer.Option(
            "--device",
            help="Whose memory a budget counts; by default that of the device train would use.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Solve the budget and show the runs; run nothing.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare methods on one recipe, or run a study: same data order, same head, several seeds.

    Interrupted, the same command goes on where it stopped. report.html is written from the first
    run on, and reloads itself. Methods that differ in more than themselves are refused.

    [bold]sparsegrad compare --methods lora,meprop,sparsegrad[/bold]
    [bold]sparsegrad compare recipes/quickstart.yaml --tune 8[/bold]
    [bold]sparsegrad compare --methods full,lora,sparsegrad --match peak=512MiB --dry-run[/bold]
    [bold]sparsegrad compare study.yaml --engine slurm engine.slurm.partition=gpu[/bold]
    """
    from rich.console import Console

    from sparsegrad_cli.report.terminal import plain_line
    from sparsegrad_cli.run import preflight
    from sparsegrad_cli.study.folder import StudyFolder
    from sparsegrad_cli.study.parity import check_parity

    study = _study(recipe, methods, seeds, match, tune, engine)
    if device is not None and study.study.budget is None:
        why = "it says whose memory a budget counts, and --match names none"
        refuse_without_effect("--device", why, "--match peak=2GiB, or leave it out")
    check_parity(study)  # before anything is solved
    preflight.check_study(study)
    path = output_dir or from_here(study.study.output_dir or f"runs/compare-{study.study.name}")
    folder, quiet = StudyFolder(path), quiet or as_json
    if dry_run:
        kept = None if overwrite else folder.record()
        _show_plan(_solved(study, kept, device, quiet=quiet), as_json)
        return
    err = Console(stderr=True, quiet=quiet)
    for note in study.notes:
        err.print(plain_line(f"note: {note}"))
    record = _run(study, folder, jobs, device, err, overwrite=overwrite, quiet=quiet)
    _show(record, folder, as_json)
    if record.status != "done":  # the table names runs that failed
        raise typer.Exit(1)


def _study(
    recipe: list[str] | None,
    methods: str | None,
    seeds: int | None,
    match: str | None,
    trials: int | None,
    engine: Engine | None,
) -> LoadedStudy:
    """Return the study of a command line: a file, or a recipe with some methods and seeds."""
    from sparsegrad_cli.cli.recipes import is_study
    from sparsegrad_cli.recipe.study import load_study, make_study

    source, overrides = split_arguments(recipe)
    if engine is not None:
        overrides = (*overrides, f"engine.name={engine.value}")
    if source is not None and is_study(source):
        if methods or seeds:
            raise UsageError(
                "a study names its own methods and seeds",
                where=source,
                fix="copy it and change it there, or compare a recipe with --methods and --seeds",
            )
        return load_study(source, overrides, match=match, trials=trials)
    names = tuple(name.strip() for name in (methods or "").split(",") if name.strip())
    if not names:
        raise UsageError(
            "no methods to compare", where="--methods", fix="--methods lora,meprop,sparsegrad"
        )
    return make_study(source, names, seeds or 2, overrides, match=match, trials=trials)


def _solved(
    study: LoadedStudy, kept: StudyRecord | None, device: Device | None, *, quiet: bool
) -> LoadedStudy:
    """Return a study at the sizes that its budget allows; those solved before are kept."""
    from sparsegrad_cli.cli.progress import ProgressObserver, QuietObserver
    from sparsegrad_cli.study.budget.solve_study import solve_study

    if study.study.budget is None:
        return study
    with QuietObserver() if quiet else ProgressObserver() as observer:
        return solve_study(
            study,
            kept=kept.budget if kept is not None else None,
            kernels=None if device is None else device.value,
            observer=observer,
        )


def _run(
    study: LoadedStudy,
    folder: StudyFolder,
    jobs: int | None,
    device: Device | None,
    err: Console,
    *,
    overwrite: bool,
    quiet: bool,
) -> StudyRecord:
    """Run a study, with a line before each run and a report that is always up to date."""
    from sparsegrad_cli.judge.grades import read_graded_answers
    from sparsegrad_cli.report.files import LiveReport
    from sparsegrad_cli.report.terminal import plain_line
    from sparsegrad_cli.study.coordinator import run_study

    report = LiveReport(folder.path, lambda line: err.print(plain_line(line)), read_graded_answers)
    return run_study(
        study,
        folder,
        command=shlex.join(["sparsegrad", *sys.argv[1:]]),
        jobs=jobs,
        overwrite=overwrite,
        quiet=quiet,
        solve=lambda study, kept: _solved(study, kept, device, quiet=quiet),
        tell=lambda line: err.print(plain_line(line, style="bold")),
        saved=report,
    )


def _show(record: StudyRecord, folder: StudyFolder, as_json: bool) -> None:
    from rich.console import Console

    from sparsegrad_cli.report.study import study_screen
    from sparsegrad_cli.report.terminal import plain_line, screen

    if as_json:
        typer.echo(json.dumps(record.to_json()))
        return
    console = Console()
    console.print(screen(study_screen(record)))
    console.print(plain_line(f"Report: {folder.path / 'report.html'}"))


def _show_plan(study: LoadedStudy, as_json: bool) -> None:
    """Print what would run."""
    from rich.console import Console

    from sparsegrad_cli.report.budget import plan_screen
    from sparsegrad_cli.report.terminal import screen
    from sparsegrad_cli.study.coordinator import plan_of

    plan = plan_of(study)
    if as_json:
        typer.echo(json.dumps(plan.to_json()))
    else:
        Console().print(screen(plan_screen(plan)))
