"""Expand a study into its runs: one checked recipe for each task, seed and method. No torch."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sparsegrad_cli.errors import Problem, RecipeError
from sparsegrad_cli.methods.registry import SIZE_KEYS, settings_class
from sparsegrad_cli.recipe.checks import recipe_problems
from sparsegrad_cli.recipe.effects import Found, without_idle
from sparsegrad_cli.recipe.layers import drop_replaced_size, read_layers, read_override, stack
from sparsegrad_cli.recipe.load_recipe import LoadedRecipe, check
from sparsegrad_cli.recipe.schema import Recipe
from sparsegrad_cli.recipe.study_checks import (
    of_overrides,
    of_rows,
    of_settings,
    unmatched_rank,
)
from sparsegrad_cli.recipe.study_section import MethodEntry, Study, TaskEntry
from sparsegrad_cli.recipe.tuning import tuning_problems
from sparsegrad_cli.recipe.yaml_source import (
    KeyPath,
    Layer,
    Place,
    clip,
    find_place,
    places_of,
)
from sparsegrad_cli.records.study import BudgetBlock

_MOST_PROBLEMS = 100
_DEFAULTS = Place("defaults")
_LAST = {"train", "calibration"}  # sections in which the command line overrides every row
Problems = dict[str, Problem]  # by text, so that each appears once


@dataclass(frozen=True)
class Cell:
    """One run of a comparison."""

    task: str
    label: str
    seed: int
    loaded: LoadedRecipe


@dataclass(frozen=True)
class LoadedStudy:
    """A checked study with a checked recipe for every run, ordered by task, seed and method.

    Attributes:
        match_place: where ``match`` was written.
        budget: the ``budget`` block of compare.json, once the budget is solved.
        notes: notes on settings of the command line that have no effect in any run.
    """

    study: Study
    source: str
    cells: tuple[Cell, ...]
    match_place: Place = _DEFAULTS
    budget: BudgetBlock | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class StudyLines:
    """Where the keys of a study's file were written.

    Attributes:
        places: key path in the file -> place.
        rows: for each row, the index of its entry under ``methods``; an entry may give several.
    """

    places: Mapping[KeyPath, Place] = field(default_factory=dict)
    rows: tuple[int, ...] = ()

    @staticmethod
    def of(layer: Layer, study: Study) -> StudyLines:
        """Return the lines of a study file that has been read."""
        rows: list[int] = []
        for number, entry in enumerate(layer.data["methods"]):
            rates = entry.get("learning_rates") if isinstance(entry, dict) else None
            rows += [number] * (len(rates) if isinstance(rates, list) else 1)
        return StudyLines(layer.places, tuple(rows))

    def under(self, *prefix: str | int) -> dict[KeyPath, Place]:
        """Return the places below a key, by the rest of their path."""
        size = len(prefix)
        return {p[size:]: at for p, at in self.places.items() if p[:size] == prefix and p[size:]}

    def of_row(self, number: int) -> dict[KeyPath, Place]:
        """Return the places of a row's keys; empty if the rows come from the command line."""
        return self.under("methods", self.rows[number]) if self.rows else {}


@dataclass(frozen=True)
class StudySource:
    """Where a study comes from.

    Attributes:
        name: name of the file, for messages.
        recipe: path of the recipe that the study is based on.
        overrides: recipe keys of the command line, for every run.
        match_place: where ``match`` was written.
        lines: where the keys of the file were written.
    """

    name: str
    recipe: str
    overrides: tuple[str, ...]
    match_place: Place
    lines: StudyLines = field(default_factory=lambda: StudyLines())


def expand(study: Study, source: StudySource) -> LoadedStudy:
    """Return a study with a checked recipe for every run.

    Raises:
        RecipeError: some run has problems; the error lists each problem once.
    """
    layers = _Layers(study, source)
    keys = [text.partition("=")[0].strip() for text in source.overrides]
    problems = of_rows(study, source.name) | of_overrides(study, keys)
    problems |= of_settings(study, source.name, source.lines.under("settings"), source.match_place)
    cells: list[Cell] = []
    idle: list[Found] = []
    tasks = tuple(enumerate(study.tasks)) or ((-1, None),)
    rows = tuple(enumerate(study.methods))
    for (at, task), seed, (row, entry) in itertools.product(tasks, study.seeds, rows):
        if len(problems) > _MOST_PROBLEMS:
            break
        shared = layers.of_all_methods(at, task, seed)
        resolved = stack(shared)
        problems |= unmatched_rank(study, entry, resolved)
        own = layers.of_method(at, task, row, resolved.data)
        try:
            loaded, without_effect = _checked([*shared, *own], source.name)
            cells.append(Cell(loaded.recipe.task.name, entry.label, seed, loaded))
            idle += [each for each in without_effect if layers.is_of_study(each)]
        except RecipeError as error:
            problems |= {f"{p.where} {p.what}": p for p in error.problems}
    everywhere = _idle_everywhere(idle, len(cells))
    problems |= {f"idle {each.idle.key}": each.problem() for each in everywhere if not each.lenient}
    problems |= _runs_written_twice(cells, source.name) if not problems else {}
    if study.tune is not None:
        problems |= _shared_decay(study, cells)
        labels = [entry.label for entry in study.methods]
        for problem in tuning_problems(study.tune, study.seeds, labels, keys, source.name):
            problems[f"{problem.where} {problem.what}"] = problem
    if problems:
        raise RecipeError(list(problems.values()))
    notes = tuple(each.note() for each in everywhere if each.lenient)
    return LoadedStudy(study, source.name, tuple(cells), source.match_place, notes=notes)


class _Layers:
    """Make the layers of a run's recipe, weakest first: recipe, study, command line.

    Args:
        study: the study.
        source: where the study comes from.
    """

    def __init__(self, study: Study, source: StudySource) -> None:
        self._study, self._source = study, source
        self._base = read_layers(source.recipe)
        self._over = [read_override(text) for text in source.overrides]

    def of_all_methods(self, at: int, task: TaskEntry | None, seed: int) -> list[Layer]:
        """Return the layers that all methods of a task and seed have in common."""
        lines = self._source.lines
        settings = dict(self._study.settings)
        found = [*self._base, self._layer(settings, "settings", lines.under("settings"))]
        if task is not None:
            data = {"task": {"name": task.name, **task.task}, "train": dict(task.train)}
            found.append(self._layer(data, f"tasks ({clip(task.name)})", lines.under("tasks", at)))
        return [*found, *self._over, self._layer({"seed": seed, "output_dir": None}, "seeds")]

    def of_method(
        self, at: int, task: TaskEntry | None, row: int, resolved: dict[str, Any]
    ) -> list[Layer]:
        """Return the stronger layers of one method, given the settings that all methods share."""
        entry = self._study.methods[row]
        found = [self._own(entry, resolved, self._source.lines.of_row(row))]
        if task is not None and entry.label in task.methods:
            where = f"tasks ({clip(task.name)}), methods ({entry.label})"
            of_task = self._source.lines.under("tasks", at, "methods", entry.label)
            said = {("train", *path): place for path, place in of_task.items()}
            found.append(self._layer({"train": dict(task.methods[entry.label])}, where, said))
        return found + [layer for layer in self._over if _LAST & set(layer.data)]

    def is_of_study(self, found: Found) -> bool:
        """Return whether a setting comes from the study or the command line, not the recipe."""
        return found.place.strength >= 2 * len(self._base)

    def _own(
        self, entry: MethodEntry, resolved: dict[str, Any], lines: Mapping[KeyPath, Place]
    ) -> Layer:
        """Return a row's own settings. Matched methods share the recipe's density.

        A budget is solved from these settings.
        """
        method = dict(entry.method)
        settings = resolved.get("method")
        said = settings if isinstance(settings, dict) else {}
        if method.get("name") == said.get("name"):
            method = {**drop_replaced_size(said, method), **method}
        matched = self._study.match is not None and entry.matched and not SIZE_KEYS & set(method)
        takes = settings_class(method)
        if matched and takes is not None and "density" in takes.model_fields:
            if said.get("entries") is not None:  # LoRA refuses this key, since it has ranks
                method["entries"] = said["entries"]
            else:
                density = said.get("density")
                method["density"] = 0.01 if density is None else density
        data: dict[str, Any] = {"method": method, "train": dict(entry.train)}
        data["calibration"] = dict(entry.calibration)
        written = {**data, "method": dict(entry.method)}
        if takes is not None and takes.solves_rank:
            data["match"] = "trainable" if method.get("density") is not None else None
        return self._layer(data, f"methods ({entry.label})", lines, written)

    def _layer(
        self,
        data: dict[str, Any],
        key: str,
        lines: Mapping[KeyPath, Place] | None = None,
        written: dict[str, Any] | None = None,
    ) -> Layer:
        """Return a layer from the study's data.

        Args:
            data: recipe keys.
            key: key of the study, named in messages if a recipe key has no line.
            lines: where the recipe keys were written, if known.
            written: the part of the data that is written in the study's file; by default all.
        """
        place = Place(f"{self._source.name}: {key}")
        places: dict[KeyPath, Place] = {(name,): place for name in data}
        places |= places_of(data if written is None else written, place)
        return Layer(data, {path: (lines or {}).get(path, at) for path, at in places.items()})


def _runs_written_twice(cells: list[Cell], source: str) -> Problems:
    met = Counter((cell.task, cell.label, cell.seed) for cell in cells)
    twice = [f"{task} {label} seed {seed}" for (task, label, seed), n in met.items() if n > 1]
    if not twice:
        return {}
    what = f"two runs are the same: {twice[0]}"
    return {"twice": Problem("seeds, tasks", what, source, None, "name each once")}


def _shared_decay(study: Study, cells: list[Cell]) -> Problems:
    """Return the problem of one weight decay for rows on which it acts differently, in tuning.

    Weight decay pulls the weights of full fine-tuning towards zero, and the effective weights of
    LoRA or a core towards their initial values. One value cannot suit both.
    """
    assert study.tune is not None
    key = "train.weight_decay"
    tuned = study.tune.keys()
    if key in tuned:  # every row then has its own value
        return {}
    own = {entry.label for entry in study.methods if "weight_decay" in entry.train}
    own |= {
        label for task in study.tasks for label, said in task.methods.items() if key[6:] in said
    }
    shared = [c for c in cells if c.label not in own and c.loaded.recipe.train.weight_decay]
    kinds = {cell.loaded.recipe.method.beside_weights: cell for cell in shared}
    if len(kinds) < 2:
        return {}
    decay = kinds[True].loaded.recipe.train.weight_decay
    what = (
        f"{decay:g} is shared by {kinds[False].label}, whose weights it pulls towards zero, and "
        f"{kinds[True].label}, whose weights it pulls towards what they were before training"
    )
    place = find_place(kinds[True].loaded.places, ("train", "weight_decay"))
    fix = "tune it for each row: tune.space.weight_decay, or give rows their own and name it under "
    return {key: Problem(key, what, place.file, place.line, f"{fix}differ")}


def _idle_everywhere(found: list[Found], cells: int) -> list[Found]:
    """Return the settings that have no effect in any run, each once."""
    count = Counter((each.idle.key, each.place) for each in found)
    everywhere = [each for each in found if count[each.idle.key, each.place] == cells]
    return list({each.idle.key: each for each in everywhere}.values())


def _checked(layers: list[Layer], source: str) -> tuple[LoadedRecipe, list[Found]]:
    """Return the recipe of a run, and its settings that have no effect for the method."""
    layer = stack(layers)
    said = check(layer, Recipe)
    recipe, idle = without_idle(said, layer)
    problems = [found.problem() for found in idle if found.refused]
    problems += recipe_problems(said if problems else recipe, layer.places)
    if problems:
        raise RecipeError(problems)
    return LoadedRecipe(recipe, source, layer.places), idle
