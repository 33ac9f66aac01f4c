"""How settings stack: defaults < extended recipes < recipe < command line. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparsegrad_cli.errors import Problem, RecipeError
from sparsegrad_cli.io.paths import expanded, is_file, is_folder
from sparsegrad_cli.io.suggest import suggest
from sparsegrad_cli.methods.registry import METHODS, settings_class
from sparsegrad_cli.recipe.shipped import find_recipe, is_of_run
from sparsegrad_cli.recipe.tasks import known_task_names
from sparsegrad_cli.recipe.yaml_source import (
    COMMAND_LINE,
    KeyPath,
    Layer,
    Place,
    clip,
    find_place,
    parse_override,
    read_yaml,
)

# A relative path in a recipe is relative to that recipe's folder, one on the command line to the
# current folder. ``model`` is anchored, too, where it names a folder (see _anchor_model).
_PATH_KEYS: tuple[KeyPath, ...] = (
    ("task", "path"),
    ("task", "chat", "forgetting"),
    ("calibration", "basis"),
    ("init_from",),
    ("output_dir",),
)
_MOST_FILES = 32  # that a recipe may extend, directly or by way of others
_RIVALS_OF_TRAIN = ("warmup_steps", "warmup_ratio")  # they replace each other


def read_layers(source: str | Path, overrides: tuple[str, ...] = ()) -> list[Layer]:
    """All layers of a recipe, weakest first: what it extends, itself, then the overrides.

    Raises:
        RecipeError: a file is missing or no YAML, ``extends`` runs in a circle, or an override
            cannot be read. All broken overrides are reported together.
    """
    layers = _read_with_parents(source, None, (), [])
    problems: list[Problem] = []
    for text in overrides:
        try:
            layers.append(read_override(text))
        except RecipeError as error:
            problems.extend(error.problems)
    if problems:
        raise RecipeError(problems)
    return layers


def read_override(text: str) -> Layer:
    """Parse ``key.path=value``; a relative path in it is relative to the current folder.

    Raises:
        RecipeError: as :func:`parse_override`.
    """
    layer = parse_override(text)
    anchor_paths(layer.data, Path.cwd())
    return layer


def _read_with_parents(
    source: str | Path, named_by: Place | None, seen: tuple[Path, ...], read: list[Path]
) -> list[Layer]:
    """The layers of a recipe and of all that it extends.

    Args:
        named_by: where it is named, if by a recipe.
        seen: the recipes that lead to it.
        read: all that were read so far.
    """
    path = find_recipe(source, relative_to=seen[-1].parent if seen else None)
    if path is None:
        place = named_by or Place(str(source))
        key = "extends" if named_by else "(file)"
        what = f"no such file: {clip(str(source))}"
        fix = "`sparsegrad configs` lists the recipes that come with it"
        raise RecipeError([Problem(key, what, file=place.file, line=place.line, fix=fix)])
    path = path.resolve()
    if path in seen:
        chain = " -> ".join(str(step) for step in (*seen, path))
        raise RecipeError([Problem("extends", f"runs in a circle: {chain}", file=str(seen[-1]))])
    read.append(path)
    if len(read) > _MOST_FILES:
        what = f"comes to more than {_MOST_FILES} files"
        raise RecipeError([Problem("extends", what, file=str(seen[0]))])
    layer = read_yaml(path, shown_as=str(source))
    if is_of_run(path):
        layer.places = {key: replace(place, settled=True) for key, place in layer.places.items()}
    # Before paths were written in full, the recipe in a run's folder named files as seen from the
    # folder where the command ran: such a run is still read from there.
    if not (path.name == "recipe.yaml" and is_file(path.parent / "run.json")):
        anchor_paths(layer.data, path.parent)
    place = layer.places.get(("extends",), Place(str(source)))
    layers: list[Layer] = []
    for parent in _parents(layer, place):
        layers += _read_with_parents(parent, place, (*seen, path), read)
    return [*layers, layer]


def _parents(layer: Layer, place: Place) -> list[str]:
    """The recipes that a layer extends, taken out of it."""
    named = layer.data.pop("extends", None)
    parents = [named] if isinstance(named, str) else [] if named is None else named
    if isinstance(parents, list) and all(isinstance(parent, str) for parent in parents):
        return parents
    problem = Problem("extends", "names files by strings", file=place.file, line=place.line)
    raise RecipeError([problem])


def anchor_paths(data: dict[str, Any], folder: Path) -> None:
    """Make every relative path in a recipe's data absolute, in place.

    Args:
        data: keys of a recipe, not yet checked.
        folder: what relative paths are relative to.
    """
    for keys in _PATH_KEYS:
        section: Any = data
        for key in keys[:-1]:
            section = section.get(key) if isinstance(section, dict) else None
        name = str(keys[-1])
        if isinstance(section, dict) and isinstance(section.get(name), str) and section[name]:
            section[name] = _anchored(section[name], folder)
    model = data.get("model")
    if isinstance(model, str):
        data["model"] = _anchor_model(model, folder)
    elif isinstance(model, dict) and isinstance(model.get("name"), str):
        model["name"] = _anchor_model(model["name"], folder)


def _anchored(name: str, folder: Path) -> str:
    path = expanded(name)
    # A home that does not exist is left as written, for the message that names it.
    return name if str(path).startswith("~") else os.path.normpath(folder / path)


def _anchor_model(name: str, folder: Path) -> str:
    """A model's folder, absolute; a hub id or a built-in model stays as it is.

    A name without a leading dot may be either. The folder beside the recipe wins, then one in the
    current folder (where transformers looks), then the hub.
    """
    if not name or name.startswith("builtin:"):
        return name
    if name.startswith((".", "/", "~")):
        return _anchored(name, folder)
    for place in (folder, Path.cwd()):
        if is_folder(place / name):
            return os.path.normpath(place / name)
    return name


def stack(layers: list[Layer]) -> Layer:
    """Merge layers, weakest first, with the per-task settings of each just above it.

    ``per_task: {glue/rte: {train: {...}}}`` in a recipe holds settings for one task; they apply
    when that task is the one asked for, and anything stronger than the recipe overrides them.
    """
    task = _task_name(layers)
    merged = Layer({})
    for number, layer in enumerate(layers):
        merged.problems += layer.problems
        data = dict(layer.data)
        per_task = data.pop("per_task", None)
        layer = Layer(data, _ranked(layer, 2 * number, 2 * len(layers)))
        _merge(merged, layer, ())
        if per_task is None:
            continue
        problem = _per_task_problem(per_task, layer)
        if problem:
            merged.problems.append(problem)
        elif task in per_task:
            prefix: KeyPath = ("per_task", task)
            places = {
                path[2:]: replace(place, strength=place.strength + 1)
                for path, place in layer.places.items()
                if path[:2] == prefix and len(path) > 2
            }
            _merge(merged, Layer(per_task[task], places), ())
    _settle_rivals(merged)
    return merged


def _settle_rivals(layer: Layer) -> None:
    """Of two keys that say the same thing, the more strongly written prevails.

    Where both are written as strongly, both stay, and the check of the recipe refuses them.
    """
    for section in ("method", "train"):
        data = layer.data.get(section)
        if not isinstance(data, dict):
            continue
        method = settings_class(data) if section == "method" else None
        names = _RIVALS_OF_TRAIN if section == "train" else method.rivals if method else ()
        said = {
            name: layer.places[section, name].strength
            for name in names
            if data.get(name) is not None and (section, name) in layer.places
        }
        for name, strength in said.items():
            if strength < max(said.values()):
                del data[name]


def _ranked(layer: Layer, strength: int, strongest: int) -> dict[KeyPath, Place]:
    """The places of a layer with its strength; all of the command line is one layer.

    ``method: lora`` is short for a mapping with a name: the name is written there, too.
    """
    places = dict(layer.places)
    for section in ("model", "task", "method"):
        if isinstance(layer.data.get(section), str) and (section,) in places:
            places[section, "name"] = places[section,]
    return {
        path: replace(place, strength=strongest if place.file == COMMAND_LINE else strength)
        for path, place in places.items()
    }


def _task_name(layers: list[Layer]) -> str:
    name = "builtin:acceptability"
    for layer in layers:
        task = layer.data.get("task")
        if isinstance(task, str):
            name = task
        elif isinstance(task, dict) and isinstance(task.get("name"), str):
            name = task["name"]
    return name


def _per_task_problem(per_task: Any, layer: Layer) -> Problem | None:
    place = find_place(layer.places, ("per_task",))
    if not isinstance(per_task, dict):
        return Problem("per_task", "maps task names to settings", place.file, place.line)
    for name, settings in per_task.items():
        if name not in known_task_names():
            here = find_place(layer.places, ("per_task", name))
            fix = suggest(str(name), known_task_names())
            return Problem(f"per_task.{name}", "is not a task", here.file, here.line, fix)
        if not isinstance(settings, dict):
            here = find_place(layer.places, ("per_task", name))
            return Problem(f"per_task.{name}", "is a mapping of settings", here.file, here.line)
    return None


def _merge(into: Layer, layer: Layer, path: KeyPath) -> None:
    # A key above the one that an override sets keeps the place where it was written.
    above = {path[:depth] for path in layer.places for depth in range(1, len(path))}
    for key_path, place in layer.places.items():
        if key_path in into.places and key_path in above and place.line is None:
            continue
        into.places[key_path] = place
    into.data = _merged(into.data, layer.data, path)


def _merged(old: Any, new: Any, path: KeyPath) -> Any:
    if path in (("model",), ("task",), ("method",)):
        old = {"name": old} if isinstance(old, str) else old
        new = {"name": new} if isinstance(new, str) else new
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    if path == ("method",):
        old = still_said(_method_settings_that_carry_over(old, new), new)
    result = dict(old)
    for key, value in new.items():
        result[key] = _merged(old.get(key), value, (*path, key))
    return result


def _method_settings_that_carry_over(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Another method starts afresh; only density goes along, to a method that selects by it."""
    name = new.get("name", old.get("name"))
    if name == old.get("name", name):
        return old
    method = METHODS.get(name) if isinstance(name, str) else None
    keeps = method is not None and method.chooses_by_density and "density" in old
    return {"density": old["density"]} if keeps else {}


def still_said(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A method's weaker settings, less the density where entries take its place, or the reverse."""
    if new.get("entries") is not None and "density" not in new:
        return {key: value for key, value in old.items() if key != "density"}
    if new.get("density") is not None and "entries" not in new:
        return {key: value for key, value in old.items() if key != "entries"}
    return old
