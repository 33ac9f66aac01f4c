"""``sparsegrad compare``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparsegrad_cli.cli.arguments import (
    Debug,
    Device,
    Json,
    Quiet,
    RecipeAndOverrides,
    is_study_file,
    refuse_without_effect,
    split_arguments,
    split_names,
)
from sparsegrad_cli.cli.output import report_line, show
from sparsegrad_cli.cli.progress import make_observer
from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.io.paths import from_here

if TYPE_CHECKING:
    from sparsegrad_cli.recipe.study import LoadedStudy
    from sparsegrad_cli.records.study import StudyRecord
    from sparsegrad_cli.study.folder import StudyFolder


class Engine(StrEnum):
    """Where the runs of a study train."""

    local = "local"
    slurm = "slurm"
    ray = "ray"


Methods = Annotated[
    str | None,
    typer.Option(
        "--methods",
        "-m",
        help="Comma-separated: lora, meprop, sparsegrad, full, or any method that sparsegrad "
        "explain lists.",
    ),
]
Seeds = Annotated[
    int | None, typer.Option("--seeds", "-n", min=1, help="Number of seeds (default: 2).")
]
Tune = Annotated[
    int | None,
    typer.Option("--tune", min=2, help="Number of tuning trials for each method before its runs."),
]
OutputDir = Annotated[
    Path | None,
    typer.Option(
        "--output-dir", "-o", help="Folder of the comparison (default: runs/compare-<name>)."
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Repeat all runs, including finished ones.")
]
EngineName = Annotated[
    Engine | None,
    typer.Option(
        "--engine",
        help="Where runs train: local processes, Slurm jobs or Ray tasks (default: the study's, "
        "else local). Its settings are keys, such as engine.slurm.partition=gpu.",
        show_default=False,
    ),
]
Jobs = Annotated[
    int | None,
    typer.Option(
        "--jobs",
        "-j",
        min=1,
        help="Number of runs at a time (default: 1; 32 on a cluster). Local runs share the CPU "
        "cores, and each has its own GPU.",
        show_default=False,
    ),
]
Match = Annotated[
    str | None,
    typer.Option(
        "--match",
        help="What all methods have in common (default: the study's): trainable (as many "
        "parameters as the recipe's density selects), a budget that sizes are solved for "
        "(trainable=70k, optimizer_state=64MiB, peak=2GiB), or none.",
        show_default=False,
    ),
]
BudgetDevice = Annotated[
    Device | None,
    typer.Option(
        "--device",
        help="Device whose memory a budget counts (default: the one that train would use).",
        show_default=False,
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Solve the budget and show the runs, but run none.")
]


def compare(
    recipe: RecipeAndOverrides = None,
    methods: Methods = None,
    seeds: Seeds = None,
    tune: Tune = None,
    output_dir: OutputDir = None,
    overwrite: Overwrite = False,
    engine: EngineName = None,
    jobs: Jobs = None,
    match: Match = None,
    device: BudgetDevice = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare methods on a recipe, or run a study: same data order, same head, several seeds.

    If the command is interrupted, the same command continues where it stopped. report.html is
    written from the first run on and reloads itself. Methods whose recipes differ in other
    settings are refused.

    [bold]sparsegrad compare --methods lora,meprop,sparsegrad[/bold]
    [bold]sparsegrad compare recipes/quickstart.yaml --tune 8[/bold]
    [bold]sparsegrad compare --methods full,lora,sparsegrad --match peak=512MiB --dry-run[/bold]
    [bold]sparsegrad compare study.yaml --engine slurm engine.slurm.partition=gpu[/bold]
    """
    from sparsegrad_cli.report.budget import plan_screen
    from sparsegrad_cli.report.study import study_screen
    from sparsegrad_cli.run import preflight
    from sparsegrad_cli.study.coordinator import plan_of
    from sparsegrad_cli.study.parity import check_parity

    source, overrides = split_arguments(recipe)
    if engine is not None:
        overrides = (*overrides, f"engine.name={engine.value}")
    study = _study(source, overrides, split_names([methods or ""]), seeds, match, tune)
    if device is not None and study.study.budget is None:
        why = "it selects the memory that a budget counts, and --match names no budget"
        refuse_without_effect("--device", why, "--match peak=2GiB, or leave it out")
    check_parity(study)  # before a budget is solved, which takes time
    preflight.check_study(study)
    folder, quiet = _folder(study, output_dir), quiet or as_json
    solve = partial(_solved, device=device, quiet=quiet)
    if dry_run:
        for note in study.notes:
            typer.echo(f"note: {note}", err=True)
        plan = plan_of(solve(study, None if overwrite else folder.record()))
        show(plan.to_json(), plan_screen(plan), as_json=as_json)
        return
    record = _run(study, folder, solve, jobs=jobs, overwrite=overwrite, quiet=quiet)
    footer = report_line(folder.path)
    show(record.to_json(), study_screen(record), as_json=as_json, footer=footer)
    if record.status != "done":
        raise typer.Exit(1)


def _study(
    source: str | None,
    overrides: tuple[str, ...],
    methods: tuple[str, ...],
    seeds: int | None,
    match: str | None,
    trials: int | None,
) -> LoadedStudy:
    """Return the study that a file describes, or the one made of a recipe, methods and seeds."""
    from sparsegrad_cli.recipe.study import load_study, make_study

    if source is not None and is_study_file(source):
        if methods or seeds:
            raise UsageError(
                "a study names its own methods and seeds",
                where=source,
                fix="change them in a copy of it, or compare a recipe with --methods and --seeds",
            )
        return load_study(source, overrides, match=match, trials=trials)
    if not methods:
        raise UsageError(
            "expected the methods to compare, got none",
            where="--methods",
            fix="--methods lora,meprop,sparsegrad",
        )
    return make_study(source, methods, seeds or 2, overrides, match=match, trials=trials)


def _folder(study: LoadedStudy, output_dir: Path | None) -> StudyFolder:
    from sparsegrad_cli.study.folder import StudyFolder

    named = study.study.output_dir or f"runs/compare-{study.study.name}"
    return StudyFolder(output_dir or from_here(named))


def _solved(
    study: LoadedStudy, previous: StudyRecord | None, *, device: Device | None, quiet: bool
) -> LoadedStudy:
    """Return a study at the sizes that its budget allows.

    Args:
        previous: The record of an interrupted comparison, whose sizes are kept.
    """
    from sparsegrad_cli.study.budget.solve_study import solve_study

    if study.study.budget is None:
        return study
    with make_observer(quiet) as observer:
        return solve_study(
            study,
            kept=previous.budget if previous is not None else None,
            kernels=None if device is None else device.value,
            observer=observer,
        )


def _run(
    study: LoadedStudy,
    folder: StudyFolder,
    solve: Callable[[LoadedStudy, StudyRecord | None], LoadedStudy],
    *,
    jobs: int | None,
    overwrite: bool,
    quiet: bool,
) -> StudyRecord:
    """Run a study: show how far it has come, and keep the report up to date."""
    from sparsegrad_cli.cli.compare_progress import CompareProgress
    from sparsegrad_cli.judge.verdicts import read_graded_answers
    from sparsegrad_cli.report.render import LiveReport
    from sparsegrad_cli.study.coordinator import run_study

    with CompareProgress(study, folder.path, quiet=quiet) as progress:
        for note in study.notes:
            progress.tell(f"note: {note}")
        report = LiveReport(folder.path, progress.tell, read_graded_answers)

        def saved(record: StudyRecord) -> None:
            progress.update(record)
            report(record)

        return run_study(
            study,
            folder,
            command=shlex.join(["sparsegrad", *sys.argv[1:]]),
            jobs=jobs,
            overwrite=overwrite,
            quiet=quiet or progress.live,
            solve=solve,
            tell=lambda line: progress.tell(line, style="bold"),
            saved=saved,
        )
