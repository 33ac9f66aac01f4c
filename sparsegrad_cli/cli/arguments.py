"""Arguments and options that several commands share, and how a recipe is read from them."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.io.paths import exists, is_file
from sparsegrad_cli.recipe.load_recipe import LoadedRecipe, load_recipe
from sparsegrad_cli.recipe.shipped import find_recipe, recipe_of_run
from sparsegrad_cli.recipe.yaml_source import read_yaml

RecipeAndOverrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RECIPE] [KEY=VALUE]...",
        help="A recipe: a file, a run's folder, or the name of a shipped recipe (default: the "
        "quickstart). Then overrides, such as train.learning_rate=1e-4.",
        show_default=False,
    ),
]
MovedPaths = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="For a run: paths that have changed since, as model.name=FOLDER or task.path=PATH.",
        show_default=False,
    ),
]
TrainedModel = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="Folder of a run, of a comparison (its best run) or of an export, a PEFT folder with "
        "the head of a classifier, or a model of transformers.",
        show_default=False,
    ),
]
TextColumn = Annotated[
    str | None, typer.Option("--text-column", help="Column of the text (default: as in training).")
]
PairColumn = Annotated[
    str | None, typer.Option("--text-pair-column", help="Column of the second text.")
]
MaxLength = Annotated[
    int | None,
    typer.Option("--max-length", min=1, help="Tokens of a text (default: as in training)."),
]
OutputDir = Annotated[
    Path | None,
    typer.Option("--output-dir", "-o", help="Folder of the run (default: the recipe's)."),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an existing run in the output folder.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the record as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


class Device(StrEnum):
    """The kind of device whose kernels decide what is saved for the backward pass."""

    cpu = "cpu"
    cuda = "cuda"


def refuse_without_effect(option: str, why: str, fix: str = "leave it out") -> NoReturn:
    """Refuse an option that another one disables.

    Raises:
        UsageError: Always.
    """
    raise UsageError(f"{option} has no effect: {why}", where="command line", fix=fix)


def split_names(texts: Iterable[str]) -> tuple[str, ...]:
    """Return the names in comma-separated texts, without empty ones."""
    return tuple(name.strip() for text in texts for name in text.split(",") if name.strip())


def split_arguments(arguments: list[str] | None) -> tuple[str | None, tuple[str, ...]]:
    """Return the recipe, which is the argument without ``=``, and the overrides.

    An argument that names an existing file in a folder, such as ``runs/lr=1e-3/recipe.yaml``, is a
    recipe, too.

    Raises:
        UsageError: There is more than one recipe.
    """
    recipes = [a for a in arguments or [] if not _is_override(a)]
    overrides = tuple(a for a in arguments or [] if _is_override(a))
    if len(recipes) > 1:
        raise UsageError(
            f"expected one recipe, got {len(recipes)}: {', '.join(recipes)}",
            where="command line",
            fix="give one recipe at a time, and write overrides as key.path=value without spaces",
        )
    return (recipes[0] if recipes else None), overrides


def _is_override(argument: str) -> bool:
    key, sign, _ = argument.partition("=")
    return bool(sign) and not ("/" in key and exists(argument))


def is_study_file(source: str) -> bool:
    """Return whether a YAML file is a study: only studies have the key ``methods``."""
    path = find_recipe(source)
    return path is not None and is_file(path) and "methods" in read_yaml(path, source).data


def load(arguments: list[str] | None, output_dir: Path | None) -> LoadedRecipe:
    """Load the recipe of a command line.

    A run's folder stands for the recipe in it, and the command then uses that folder again.
    """
    source, overrides = split_arguments(arguments)
    within = None if source is None else recipe_of_run(source)
    if within is not None:
        elsewhere = any(text.partition("=")[0].strip() == "output_dir" for text in overrides)
        if output_dir is None and not elsewhere:
            output_dir = within.parent
        source = str(within)
    return load_recipe(source, overrides, output_dir=output_dir)
