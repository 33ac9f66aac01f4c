"""Stack settings: defaults < extended recipes < recipe < command line. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparsegrad_cli.errors import Problem, RecipeError
from sparsegrad_cli.io.paths import expanded, is_folder
from sparsegrad_cli.io.suggest import suggest
from sparsegrad_cli.methods.registry import settings_class
from sparsegrad_cli.recipe.shipped import find_recipe, is_of_run, restore_advice
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

# A relative path in a recipe is relative to the recipe's folder, and one on the command line to the
# current folder. The same holds for ``model`` if it names a folder (see _anchor_model).
_PATH_KEYS: tuple[KeyPath, ...] = (
    ("task", "path"),
    ("task", "chat", "forgetting"),
    ("calibration", "basis"),
    ("train", "sample_prompts"),
    ("init_from",),
    ("output_dir",),
)
_MOST_FILES = 32  # limit on the files that a recipe extends, directly or indirectly
# Only one of them is used.
_ALTERNATIVES = {"task": ("path", "mix"), "train": ("warmup_steps", "warmup_ratio")}


def read_layers(source: str | Path, overrides: tuple[str, ...] = ()) -> list[Layer]:
    """Read all layers of a recipe, weakest first: extended recipes, the recipe, overrides.

    Raises:
        RecipeError: A file is missing or not YAML, ``extends`` forms a cycle, or an override cannot
            be read. All invalid overrides are reported together.
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
        RecipeError: See :func:`parse_override`.
    """
    layer = parse_override(text)
    anchor_paths(layer.data, Path.cwd())
    return layer


def _read_with_parents(
    source: str | Path, named_by: Place | None, seen: tuple[Path, ...], read: list[Path]
) -> list[Layer]:
    """Read the layers of a recipe and of all recipes that it extends.

    Args:
        named_by: The place of the ``extends`` that names it, if there is one.
        seen: The chain of recipes that leads to it.
        read: All files read so far; this function appends to it.
    """
    path = find_recipe(source, relative_to=seen[-1].parent if seen else None)
    if path is None:
        place = named_by or Place(str(source))
        key = "extends" if named_by else "(file)"
        what = f"no such file: {clip(str(source))}"
        fix = "`sparsegrad configs` lists the shipped recipes"
        raise RecipeError([place.problem(key, what, fix)])
    path = path.resolve()
    if path in seen:
        chain = " -> ".join(str(step) for step in (*seen, path))
        raise RecipeError([Place(str(seen[-1])).problem("extends", f"forms a cycle: {chain}")])
    read.append(path)
    if len(read) > _MOST_FILES:
        what = f"adds up to more than {_MOST_FILES} files"
        raise RecipeError([Place(str(seen[0])).problem("extends", what)])
    try:
        layer = read_yaml(path, shown_as=str(source))
    except RecipeError as error:
        if not is_of_run(path):
            raise
        fix = restore_advice(path.parent)
        raise RecipeError([replace(p, fix=p.fix or fix) for p in error.problems]) from error
    if is_of_run(path):
        # Older versions wrote relative paths into the recipe of a run, relative to the folder where
        # the command ran. They stay as they are, so that the run can be read from that folder.
        layer.places = {key: replace(place, settled=True) for key, place in layer.places.items()}
    else:
        anchor_paths(layer.data, path.parent)
    place = layer.places.get(("extends",), Place(str(source)))
    layers: list[Layer] = []
    for parent in _parents(layer, place):
        layers += _read_with_parents(parent, place, (*seen, path), read)
    return [*layers, layer]


def _parents(layer: Layer, place: Place) -> list[str]:
    """Remove ``extends`` from a layer and return the recipes that it names."""
    named = layer.data.pop("extends", None)
    parents = [named] if isinstance(named, str) else [] if named is None else named
    if isinstance(parents, list) and all(isinstance(parent, str) for parent in parents):
        return parents
    what = "expected a file name, or a list of file names"
    raise RecipeError([place.problem("extends", what)])


def anchor_paths(data: dict[str, Any], folder: Path) -> None:
    """Make every relative path in a recipe's data absolute, in place.

    Args:
        data: The content of a recipe before it is checked.
        folder: The folder that relative paths start from.
    """
    for keys in _PATH_KEYS:
        section: Any = data
        for key in keys[:-1]:
            section = section.get(key) if isinstance(section, dict) else None
        name = str(keys[-1])
        path = section.get(name) if isinstance(section, dict) else None
        if isinstance(path, str) and path and not path.startswith("builtin:"):
            section[name] = _anchored(path, folder)
    _anchor_sources(data.get("task"), folder)
    model = data.get("model")
    if isinstance(model, str):
        data["model"] = _anchor_model(model, folder)
    elif isinstance(model, dict) and isinstance(model.get("name"), str):
        model["name"] = _anchor_model(model["name"], folder)


def _anchor_sources(task: Any, folder: Path) -> None:
    """Make the paths of a mixture and of the evaluation sets absolute, in place."""
    if not isinstance(task, dict):
        return
    holders: list[tuple[Any, Any]] = []  # (mapping or list, key) of each path
    mix, sets = task.get("mix"), task.get("evaluation")
    if isinstance(mix, list):
        holders += [
            (source, "path") if isinstance(source, dict) else (mix, at)
            for at, source in enumerate(mix)
        ]
    if isinstance(sets, dict):
        holders += [(sets, name) for name in sets]
    for holder, key in holders:
        path = holder.get(key) if isinstance(holder, dict) else holder[key]
        if isinstance(path, str) and path:
            holder[key] = _anchored(path, folder)


def _anchored(name: str, folder: Path) -> str:
    path = expanded(name)
    # A home folder that does not exist stays as written, so that the error can quote it.
    return name if str(path).startswith("~") else os.path.normpath(folder / path)


def _anchor_model(name: str, folder: Path) -> str:
    """Return the absolute path of a model's folder; leave a hub id or built-in model unchanged.

    A name without a leading dot can mean a folder or a hub id. A folder beside the recipe comes
    first, then one in the current folder (where transformers looks), then the hub.
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
    """Merge layers, weakest first, each with its settings for the task just above it.

    ``per_task: {glue/rte: {train: {...}}}`` holds settings for one task. They apply if the recipe's
    task is that one, and any layer that is stronger than the recipe overrides them.
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
    _drop_weaker_alternatives(merged)
    return merged


def _drop_weaker_alternatives(layer: Layer) -> None:
    """Keep the stronger of two keys that replace each other, with a note.

    If both come from the same layer, both stay, and the schema refuses them.
    """
    for section in ("task", "method", "train"):
        data = layer.data.get(section)
        if not isinstance(data, dict):
            continue
        method = settings_class(data) if section == "method" else None
        names = _ALTERNATIVES.get(section) or (method.rivals if method else ())
        places = {
            name: layer.places[section, name]
            for name in names
            if data.get(name) is not None and (section, name) in layer.places
        }
        strongest = max(places, key=lambda name: places[name].strength, default="")
        for name, place in places.items():
            if place.strength < places[strongest].strength:
                del data[name]
                layer.notes.append(
                    f"{section}.{name} ({place}) has no effect: {section}.{strongest} "
                    f"({places[strongest]}) overrules it"
                )


def _ranked(layer: Layer, strength: int, strongest: int) -> dict[KeyPath, Place]:
    """Return the places of a layer with its strength; the whole command line is one layer.

    ``method: lora`` is short for ``method: {name: lora}``, so the name has the same place.
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
    if not isinstance(per_task, dict):
        place = find_place(layer.places, ("per_task",))
        return place.problem("per_task", "expected a mapping of task names to settings")
    for name, settings in per_task.items():
        place, key = find_place(layer.places, ("per_task", name)), f"per_task.{name}"
        if name not in known_task_names():
            return place.problem(key, "is not a task", suggest(str(name), known_task_names()))
        if not isinstance(settings, dict):
            return place.problem(key, "expected a mapping of settings")
    return None


def _merge(into: Layer, layer: Layer, path: KeyPath) -> None:
    # A parent of the key that an override sets keeps the place where it was written.
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
        old = drop_replaced_size(_inherited_method_settings(old, new), new)
    result = dict(old)
    for key, value in new.items():
        result[key] = _merged(old.get(key), value, (*path, key))
    return result


def _inherited_method_settings(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Return the weaker settings that stay valid: for another method only a density it can use."""
    name = new.get("name", old.get("name"))
    if name == old.get("name", name):
        return old
    method = settings_class(name) if isinstance(name, str) else None
    keeps = method is not None and method.chooses_by_density and "density" in old
    return {"density": old["density"]} if keeps else {}


def drop_replaced_size(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Return a method's weaker settings without the size (density or entries) that is replaced."""
    if new.get("entries") is not None and "density" not in new:
        return {key: value for key, value in old.items() if key != "density"}
    if new.get("density") is not None and "entries" not in new:
        return {key: value for key, value in old.items() if key != "entries"}
    return old
