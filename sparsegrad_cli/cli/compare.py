"""compare."""

from __future__ import annotations

import json
import shlex
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    from sparsegrad_cli.recipe.study import LoadedStudy
    from sparsegrad_cli.study.folder import StudyFolder


def compare(
    recipe: RecipeAndOverrides = None,
    methods: Annotated[
        str | None,
        typer.Option("--methods", "-m", help="Comma-separated: full, lora, meprop, sparsegrad."),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option("--seeds", "-n", min=1, help="How many seeds; 2 by default.")
    ] = None,
    tune: Annotated[
        int | None,
        typer.Option("--tune", min=2, help="Trials to tune each method by, before its cells run."),
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", "-o", help="runs/compare-<name> by default.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Run all cells again, finished ones too.")
    ] = False,
    jobs: Annotated[
        int, typer.Option("--jobs", "-j", min=1, help="Cells at once; they share the cores.")
    ] = 1,
    match: Annotated[
        str | None,
        typer.Option(
            "--match",
            help="What all spend alike: trainable (entries, by the recipe's density), a budget "
            "that sizes are solved for (trainable=70k, optimizer_state=64MiB, "
            "peak=2GiB), or none. A study's own by default.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        Device | None,
        typer.Option(
            "--device",
            help="Whose memory a budget counts; of what train would use here by default.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Solve the budget, show what would run, run nothing.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare methods on one recipe, or run a study: same data order, same head, several seeds.

    Interrupted, the same command goes on where it stopped. report.html is there from the first
    run on, and renews itself. Methods that differ in more than themselves are refused.

    [bold]sparsegrad compare --methods lora,meprop,sparsegrad[/bold]
    [bold]sparsegrad compare recipes/quickstart.yaml --tune 8[/bold]
    [bold]sparsegrad compare --methods full,lora,sparsegrad --match peak=512MiB --dry-run[/bold]
    """
    from rich.console import Console

    from sparsegrad_cli.io.atomic import without_nan
    from sparsegrad_cli.judge.grades import read_graded_answers
    from sparsegrad_cli.records.study import StudyRecord
    from sparsegrad_cli.report.files import LiveReport
    from sparsegrad_cli.report.study import study_screen
    from sparsegrad_cli.report.terminal import plain_line, screen
    from sparsegrad_cli.run import preflight
    from sparsegrad_cli.study.folder import StudyFolder
    from sparsegrad_cli.study.parity import check_parity
    from sparsegrad_cli.study.runner import Comparison
    from sparsegrad_cli.study.solving import solving

    study = _study(recipe, methods, seeds, match, tune)
    if device is not None and study.study.budget is None:
        why = "it says whose memory a budget counts, and --match names none"
        refuse_without_effect("--device", why, "--match peak=2GiB, or leave it out")
    check_parity(study)  # before anything is solved
    preflight.check_study(study)
    folder = output_dir or from_here(study.study.output_dir or f"runs/compare-{study.study.name}")
    quiet = quiet or as_json
    place = StudyFolder(folder)
    solve = partial(_solved, study, place, device, quiet=quiet, afresh=overwrite)
    if dry_run:
        _show_plan(solve(), as_json)
        return
    err = Console(stderr=True, quiet=quiet)
    for note in study.notes:
        err.print(plain_line(f"note: {note}"))

    def tell(line: str) -> None:
        err.print(plain_line(line, style="bold"))

    report = LiveReport(folder, lambda text: err.print(plain_line(text)), read_graded_answers)

    def saved(record: dict[str, Any]) -> None:
        report(StudyRecord.model_validate(without_nan(record)))

    with ExitStack() as held:
        if study.study.budget is not None:
            held.enter_context(solving(place, tell, overwrite=overwrite))
        comparison = Comparison(
            solve(),
            folder,
            command=shlex.join(["sparsegrad", *sys.argv[1:]]),
            overwrite=overwrite,
            tell=tell,
            quiet=quiet,
            jobs=jobs,
            saved=saved,
            begun=held.close,
        )
        record = comparison.run()
    if as_json:
        typer.echo(json.dumps(record))
    else:
        console = Console()
        console.print(screen(study_screen(StudyRecord.model_validate(without_nan(record)))))
        console.print(plain_line(f"Report: {folder / 'report.html'}"))
    if record["status"] != "done":  # a cell that failed is named in the table
        raise typer.Exit(1)


def _solved(
    study: LoadedStudy,
    place: StudyFolder,
    device: Device | None,
    *,
    quiet: bool,
    afresh: bool,
) -> LoadedStudy:
    """At the sizes that its budget allows; a comparison that goes on keeps those that it has."""
    from sparsegrad_cli.cli.progress import ProgressObserver, QuietObserver
    from sparsegrad_cli.study.solving import picked

    if study.study.budget is None:
        return study
    kept = {} if afresh else picked(place)
    with QuietObserver() if quiet else ProgressObserver() as observer:
        from sparsegrad_cli.study.budget.solve_study import solve_study

        return solve_study(
            study,
            kept=kept,
            kernels=None if device is None else device.value,
            observer=observer,
        )


def _show_plan(study: LoadedStudy, as_json: bool) -> None:
    """What would run, on stdout."""
    from rich.console import Console

    from sparsegrad_cli.io.atomic import without_nan
    from sparsegrad_cli.records.study import PlanRecord
    from sparsegrad_cli.report.budget import plan_screen
    from sparsegrad_cli.report.terminal import screen
    from sparsegrad_cli.study.plan import plan_of

    plan = plan_of(study)
    if as_json:
        typer.echo(json.dumps(plan))
    else:
        Console().print(screen(plan_screen(PlanRecord.model_validate(without_nan(plan)))))


def _study(
    recipe: list[str] | None,
    methods: str | None,
    seeds: int | None,
    match: str | None,
    trials: int | None,
) -> LoadedStudy:
    from sparsegrad_cli.cli.recipes import is_study
    from sparsegrad_cli.recipe.study import load_study, make_study

    source, overrides = split_arguments(recipe)
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
            "which methods?", where="--methods", fix="--methods lora,meprop,sparsegrad"
        )
    return make_study(source, names, seeds or 2, overrides, match=match, trials=trials)
