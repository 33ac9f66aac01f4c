"""compare."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparsegrad_cli.cli.arguments import Debug, Json, Quiet, RecipeAndOverrides, split_arguments
from sparsegrad_cli.errors import UsageError

if TYPE_CHECKING:
    from sparsegrad_cli.recipe.study import LoadedStudy


def compare(
    recipe: RecipeAndOverrides = None,
    methods: Annotated[
        str | None,
        typer.Option("--methods", "-m", help="Comma-separated: full, lora, meprop, sparsegrad."),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option("--seeds", "-n", help="How many seeds; 2 by default.")
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
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare methods on one recipe, or run a study: same data order, same head, several seeds.

    Interrupted, the same command goes on where it stopped. report.html is there from the first
    run on, and renews itself. Methods that differ in more than themselves are refused.

    [bold]sparsegrad compare --methods lora,meprop,sparsegrad[/bold]
    [bold]sparsegrad compare recipes/quickstart.yaml --tune 8[/bold]
    """
    from rich.console import Console

    from sparsegrad_cli.compare.grid import Comparison
    from sparsegrad_cli.report.compare_files import LiveReport
    from sparsegrad_cli.report.terminal import compare_table, plain_line

    study = _study(recipe, methods, seeds, tune)
    folder = output_dir or Path(study.study.output_dir or f"runs/compare-{study.study.name}")
    err = Console(stderr=True, quiet=quiet or as_json)
    command = shlex.join(["sparsegrad", *sys.argv[1:]])
    comparison = Comparison(
        study,
        folder,
        command=command,
        overwrite=overwrite,
        tell=lambda text: err.print(plain_line(text, style="bold")),
        quiet=quiet or as_json,
        jobs=jobs,
        saved=LiveReport(folder, lambda text: err.print(plain_line(text))),
    )
    record = comparison.run()
    if as_json:
        typer.echo(json.dumps(record))
    else:
        console = Console()
        console.print(compare_table(record))
        console.print(plain_line(f"Report: {folder / 'report.html'}"))
    if all(row["status"] != "done" for row in record["rows"]):
        raise typer.Exit(1)


def _study(
    recipe: list[str] | None, methods: str | None, seeds: int | None, trials: int | None
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
        return load_study(source, overrides, trials=trials)
    names = tuple(name.strip() for name in (methods or "").split(",") if name.strip())
    if not names:
        raise UsageError(
            "which methods?", where="--methods", fix="--methods lora,meprop,sparsegrad"
        )
    return make_study(source, names, seeds or 2, overrides, trials=trials)
