"""What several commands take: a recipe, overrides, where to write."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.io.paths import exists
from sparsegrad_cli.recipe.load_recipe import LoadedRecipe, load_recipe
from sparsegrad_cli.recipe.shipped import recipe_of_run

RecipeAndOverrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RECIPE] [KEY=VALUE]...",
        help="A recipe (file, run folder, or name of a shipped one; the quickstart by default), "
        "then overrides such as train.learning_rate=1e-4.",
        show_default=False,
    ),
]
MovedPaths = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="For a run, what has moved since: model.name=FOLDER, task.path=PATH.",
        show_default=False,
    ),
]
OutputDir = Annotated[
    Path | None,
    typer.Option("--output-dir", "-o", help="Run directory; output_dir of the recipe otherwise."),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the run in a non-empty output_dir.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the record as JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


class Device(StrEnum):
    """Whose kernels save for the backward pass."""

    cpu = "cpu"
    cuda = "cuda"


def refuse_without_effect(option: str, why: str, fix: str = "leave it out") -> NoReturn:
    """Refuse an option that another one disables.

    Raises:
        UsageError: always.
    """
    raise UsageError(f"{option} has no effect: {why}", where="command line", fix=fix)


def split_arguments(arguments: list[str] | None) -> tuple[str | None, tuple[str, ...]]:
    """The recipe is the argument without ``=``; all others are overrides.

    A file in a folder, such as ``runs/lr=1e-3/recipe.yaml``, is a recipe whatever it is called.

    Raises:
        UsageError: two recipes.
    """
    recipes = [a for a in arguments or [] if not _is_override(a)]
    overrides = tuple(a for a in arguments or [] if _is_override(a))
    if len(recipes) > 1:
        raise UsageError(
            f"one recipe at a time: {', '.join(recipes)}",
            fix="overrides are written key.path=value, without spaces",
        )
    return (recipes[0] if recipes else None), overrides


def _is_override(argument: str) -> bool:
    key, sign, _ = argument.partition("=")
    return bool(sign) and not ("/" in key and exists(argument))


def load(arguments: list[str] | None, output_dir: Path | None) -> LoadedRecipe:
    """The recipe of a command line. A run folder stands for the recipe in it, and for itself."""
    source, overrides = split_arguments(arguments)
    within = None if source is None else recipe_of_run(source)
    if within is not None:
        elsewhere = any(text.partition("=")[0].strip() == "output_dir" for text in overrides)
        if output_dir is None and not elsewhere:
            output_dir = within.parent
        source = str(within)
    return load_recipe(source, overrides, output_dir=output_dir)
