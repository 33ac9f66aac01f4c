"""``sparsegrad validate`` and ``configs``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparsegrad_cli.cli.arguments import (
    Debug,
    Json,
    RecipeAndOverrides,
    is_study_file,
    load,
    split_arguments,
)
from sparsegrad_cli.errors import DiskError, UsageError
from sparsegrad_cli.io.paths import exists, is_folder
from sparsegrad_cli.io.suggest import suggest
from sparsegrad_cli.recipe.load_recipe import digest, to_plain, to_yaml
from sparsegrad_cli.recipe.shipped import LAUNCHERS, shipped_files
from sparsegrad_cli.run import preflight

if TYPE_CHECKING:
    from sparsegrad_cli.recipe.study import LoadedStudy

# The shipped folders, their headings, and the commands that read their files.
_KINDS = {
    "configs": ("Recipes", "sparsegrad train, calibrate, compare"),
    "recipes": ("Comparisons", "sparsegrad compare"),
    LAUNCHERS: ("Several processes", "accelerate launch --config_file"),
}
# What needs no download and ends within minutes on a laptop.
_STARTERS = (
    "configs/quickstart.yaml",
    "configs/smollm2_dialogues.yaml",
    "recipes/quickstart.yaml",
)

configs_app = typer.Typer(
    help="List or copy the recipes that come with sparsegrad.", invoke_without_command=True
)


def validate(
    recipe: RecipeAndOverrides = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check a recipe or a study without loading a model, and print it with all defaults."""
    source, overrides = split_arguments(recipe)
    if source is not None and is_study_file(source):
        _validate_study(source, overrides, as_json=as_json)
    else:
        _validate_recipe(recipe, as_json=as_json)


def _validate_recipe(arguments: list[str] | None, *, as_json: bool) -> None:
    loaded = load(arguments, None)
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


def _validate_study(source: str, overrides: tuple[str, ...], *, as_json: bool) -> None:
    from sparsegrad_cli.recipe.study import load_study
    from sparsegrad_cli.study.parity import check_parity

    study = load_study(source, overrides)
    check_parity(study)
    preflight.check_study(study)
    if not as_json:
        typer.echo(f"{source}: a valid study, {len(study.cells)} runs{_before_the_runs(study)}")
        return
    runs = [
        {"task": run.task, "method": run.label, "seed": run.seed, **to_plain(run.loaded.recipe)}
        for run in study.cells
    ]
    typer.echo(json.dumps({"name": study.study.name, "match": study.study.match, "cells": runs}))


def _before_the_runs(study: LoadedStudy) -> str:
    """Return the tuning and the budget that come before the runs, to end a sentence.

    For example ``, after 8 trials of tuning for each of 4 methods on 3 tasks``.
    """
    text = ""
    if study.study.tune is not None:
        tasks = len({run.task for run in study.cells})
        rows = f"{len(study.study.methods)} methods on {tasks} task{'' if tasks == 1 else 's'}"
        seeds = "each seed of " if study.study.tune.own else "each of "
        text = f", after {study.study.tune.trials} trials of tuning for {seeds}{rows}"
    if study.study.budget is not None:
        text += f"; compare --dry-run solves its budget, {study.study.match}"
    return text


@configs_app.callback()
def configs(context: typer.Context) -> None:
    """List recipes (train, calibrate), studies (compare) and settings for accelerate launch."""
    if context.invoked_subcommand is None:
        list_configs()


@configs_app.command("list")
def list_configs() -> None:
    """List the shipped files, the ones to start with first."""
    kinds = {kind: {f"{kind}/{path.name}": path for path in shipped_files(kind)} for kind in _KINDS}
    everything = {name: path for files in kinds.values() for name, path in files.items()}
    starters = {name: everything[name] for name in _STARTERS}
    _print_files("Start here: no download, minutes on two CPU cores", starters)
    for kind, (heading, use) in _KINDS.items():
        others = {n: path for n, path in kinds[kind].items() if n not in _STARTERS}
        _print_files(f"{heading} ({use})", others)


def _print_files(heading: str, files: Mapping[str, Path]) -> None:
    """Print files under a heading, each with the first line of its comment."""
    typer.echo(heading)
    for name, path in files.items():
        typer.echo(f"  {name:<40} {_first_comment(path)}")
    typer.echo("")


@configs_app.command("copy")
def copy(
    name: Annotated[str, typer.Argument(help="Name of the file, such as roberta_glue.")],
    to: Annotated[
        Path | None, typer.Argument(help="File or folder (default: the current folder).")
    ] = None,
) -> None:
    """Copy a shipped recipe, study or launcher configuration, to change it."""
    source = _shipped_file(name)
    target = to or Path(source.name)
    if is_folder(target):
        target = target / source.name
    if exists(target):
        raise UsageError(f"{target} exists already", where="command line", fix="name another file")
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        what = f"{target} cannot be written: {error.strerror or error}"
        raise DiskError(what, where=str(target.parent), fix="name another file") from error
    typer.echo(f"wrote {target}")


def _shipped_file(name: str) -> Path:
    """Return the shipped file of a name, with or without its folder and ``.yaml``.

    Raises:
        UsageError: There is no such file.
    """
    stem = name.removesuffix(".yaml")
    for kind in ("configs", "recipes", "accelerate"):
        stem = stem.removeprefix(f"{kind}/")
    files = {path.stem: path for kind in _KINDS for path in shipped_files(kind)}
    if stem not in files:
        raise UsageError(
            f"no shipped recipe {name!r}", where="command line", fix=suggest(stem, list(files))
        )
    return files[stem]


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""
