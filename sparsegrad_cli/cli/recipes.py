"""validate, configs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparsegrad_cli.cli.arguments import Debug, Json, RecipeAndOverrides, load, split_arguments
from sparsegrad_cli.errors import DiskError, UsageError
from sparsegrad_cli.io.paths import exists, is_file, is_folder
from sparsegrad_cli.recipe.load_recipe import digest, to_plain, to_yaml
from sparsegrad_cli.recipe.shipped import LAUNCHERS, shipped_files
from sparsegrad_cli.run import preflight

if TYPE_CHECKING:
    from sparsegrad_cli.recipe.study import LoadedStudy

# What comes along, and the commands that take it.
_KINDS = {
    "configs": "train, calibrate, compare",
    "recipes": "compare",
    LAUNCHERS: "accelerate launch --config_file",
}

configs_app = typer.Typer(
    help="The recipes that come with sparsegrad.", invoke_without_command=True
)


def validate(
    recipe: RecipeAndOverrides = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check a recipe or a study and print it resolved, defaults written out. Loads no model."""
    source, overrides = split_arguments(recipe)
    if source is not None and is_study(source):
        from sparsegrad_cli.recipe.study import load_study
        from sparsegrad_cli.study.parity import check_parity

        study = load_study(source, overrides)
        check_parity(study)
        preflight.check_study(study)
        if as_json:
            shown = {"name": study.study.name, "match": study.study.match}
            cells = [
                {"task": c.task, "method": c.label, "seed": c.seed, **to_plain(c.loaded.recipe)}
                for c in study.cells
            ]
            typer.echo(json.dumps({**shown, "cells": cells}))
            return
        typer.echo(f"{source}: a valid study, {len(study.cells)} cells{_before_them(study)}")
        return
    loaded = load(recipe, None)
    preflight.check(loaded, trains=True)
    for note in preflight.notes(loaded):
        typer.echo(f"note: {note}", err=True)
    if as_json:
        typer.echo(json.dumps(to_plain(loaded.recipe)))
        return
    typer.echo(f"# {loaded.source}: valid, digest {digest(loaded.recipe)[:16]}")
    for note in loaded.notes:
        typer.echo(f"# note: {note}")
    typer.echo(to_yaml(loaded.recipe), nl=False)


def _before_them(study: LoadedStudy) -> str:
    """``, after 8 trials of tuning for each of 4 methods on 3 tasks``, if there is any; budgets."""
    said = ""
    if study.study.tune is not None:
        tasks = len({cell.task for cell in study.cells})
        rows = f"{len(study.study.methods)} methods on {tasks} task{'' if tasks == 1 else 's'}"
        said = f", after {study.study.tune.trials} trials of tuning for each of {rows}"
    if study.study.budget is not None:
        said += f"; compare --dry-run solves its budget, {study.study.match}"
    return said


def is_study(source: str) -> bool:
    """Whether it is a study: a recipe has no ``methods``."""
    from sparsegrad_cli.recipe.shipped import find_recipe
    from sparsegrad_cli.recipe.source import read_yaml

    path = find_recipe(source)
    return path is not None and is_file(path) and "methods" in read_yaml(path, source).data


@configs_app.callback()
def configs(context: typer.Context) -> None:
    """List recipes (train, calibrate), studies (compare) and settings for accelerate launch."""
    if context.invoked_subcommand is not None:
        return
    for kind, use in _KINDS.items():
        for path in shipped_files(kind):
            typer.echo(f"{f'{kind}/{path.name}':<40} {_first_comment(path)} [{use}]")


@configs_app.command("copy")
def copy(
    name: Annotated[str, typer.Argument(help="For example roberta_glue.")],
    to: Annotated[Path | None, typer.Argument(help="File or folder; here by default.")] = None,
) -> None:
    """Copy a shipped recipe, study or launcher's settings, to make it one's own."""
    stem = name.removesuffix(".yaml")
    for kind in ("configs", "recipes", "accelerate"):
        stem = stem.removeprefix(f"{kind}/")
    there = {path.stem: path for kind in _KINDS for path in shipped_files(kind)}
    if stem not in there:
        from sparsegrad_cli.io.suggest import suggest

        raise UsageError(f"no shipped recipe {name!r}", fix=suggest(stem, list(there)))
    target = to or Path(there[stem].name)
    if is_folder(target):
        target = target / there[stem].name
    if exists(target):
        raise UsageError(f"{target} exists already", fix="name another file")
    try:
        shutil.copyfile(there[stem], target)
    except OSError as error:
        what = f"{target} cannot be written: {error.strerror or error}"
        raise DiskError(what, where=str(target.parent), fix="name another file") from error
    typer.echo(f"wrote {target}")


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""
