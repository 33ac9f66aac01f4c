"""Expand a study into its runs: one checked recipe for each task, seed and method. No torch."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sparsegrad_cli.errors import Problem, RecipeError
from sparsegrad_cli.methods.registry import SIZE_KEYS, settings_class, spelled_out
from sparsegrad_cli.recipe.effects import Found
from sparsegrad_cli.recipe.layers import drop_replaced_size, read_layers, read_override, stack
from sparsegrad_cli.recipe.load_recipe import LoadedRecipe, resolve
from sparsegrad_cli.recipe.study_checks import (
    holdout_problems,
    override_problems,
    rank_problems,
    row_problems,
    row_space_problems,
    settings_problems,
    test_problems,
    tuning_problems,
)
from sparsegrad_cli.recipe.study_section import MethodEntry, Study, TaskEntry
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


class _Problems(dict[tuple[str, str], Problem]):
    """Problems by place and text, so that each appears once."""

    def add(self, found: Iterable[Problem]) -> None:
        self.update({(problem.where, problem.what): problem for problem in found})


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
class StudySource:
    """Where a study comes from.

    Attributes:
        name: name of the file, for messages.
        recipe: path of the recipe that the study is based on.
        overrides: recipe keys of the command line, for every run.
        match_place: where ``match`` was written.
        places: where the keys of the study's file were written.
        rows: for each row, the index of its entry under ``methods``; an entry may give several.
            Empty if the rows come from the command line.
    """

    name: str
    recipe: str
    overrides: tuple[str, ...]
    match_place: Place
    places: Mapping[KeyPath, Place] = field(default_factory=dict)
    rows: tuple[int, ...] = ()

    def places_under(self, *prefix: str | int) -> dict[KeyPath, Place]:
        """Return the places below a key, by the rest of their path."""
        size = len(prefix)
        return {p[size:]: at for p, at in self.places.items() if p[:size] == prefix and p[size:]}

    def places_of_row(self, number: int) -> dict[KeyPath, Place]:
        """Return the places of a row's keys."""
        return self.places_under("methods", self.rows[number]) if self.rows else {}


def expand(study: Study, source: StudySource) -> LoadedStudy:
    """Return a study with a checked recipe for every run.

    Raises:
        RecipeError: some run has problems; the error lists each problem once.
    """
    layers, problems = _Layers(study, source), _Problems()
    keys = [text.partition("=")[0].strip() for text in source.overrides]
    problems.add(row_problems(study, source.name))
    problems.add(override_problems(study, keys))
    said = source.places_under("settings")
    problems.add(settings_problems(study, source.name, said, source.match_place))
    problems.add(tuning_problems(study, keys, source.name))
    problems.add(test_problems(study, source.name))
    cells: list[Cell] = []
    idle: list[Found] = []
    overruled: dict[str, None] = {}  # notes on settings that all methods share
    tasks = tuple(enumerate(study.tasks)) or ((-1, None),)
    rows = tuple(enumerate(study.methods))
    for (at, task), seed, (row, entry) in itertools.product(tasks, study.seeds, rows):
        if len(problems) > _MOST_PROBLEMS:
            break
        shared = layers.of_all_methods(at, task, seed)
        resolved = stack(shared)
        overruled |= dict.fromkeys(resolved.notes)
        problems.add(rank_problems(study, entry, resolved))
        own = layers.of_method(at, task, row, resolved.data)
        try:
            loaded, without_effect = resolve(stack([*shared, *own]), source.name)
            cells.append(Cell(loaded.recipe.task.name, entry.label, seed, loaded))
            idle += [each for each in without_effect if layers.is_of_study(each)]
        except RecipeError as error:
            problems.add(error.problems)
    everywhere = _idle_everywhere(idle, len(cells))
    problems.add(each.problem() for each in everywhere if not each.lenient)
    problems.add(_shared_decay(study, cells))
    if not problems:
        problems.add(_runs_written_twice(cells, source.name))
        recipes = (cell.loaded.recipe for cell in cells)
        problems.add(holdout_problems(study, recipes, source.name))
        by_label = {cell.label: cell.loaded.recipe for cell in cells}
        problems.add(row_space_problems(study, by_label, source.name))
    if problems:
        raise RecipeError(list(problems.values()))
    notes = (*overruled, *(each.note() for each in everywhere if each.lenient))
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
        places_under = self._source.places_under
        settings = dict(self._study.settings)
        found = [*self._base, self._layer(settings, "settings", places_under("settings"))]
        if task is not None:
            data = {"task": {"name": task.name, **task.task}, "train": dict(task.train)}
            found.append(self._layer(data, f"tasks ({clip(task.name)})", places_under("tasks", at)))
        return [*found, *self._over, self._layer({"seed": seed, "output_dir": None}, "seeds")]

    def of_method(
        self, at: int, task: TaskEntry | None, row: int, resolved: dict[str, Any]
    ) -> list[Layer]:
        """Return the stronger layers of one method, given the settings that all methods share."""
        entry = self._study.methods[row]
        found = [self._own(entry, resolved, self._source.places_of_row(row))]
        if task is not None and entry.label in task.methods:
            where = f"tasks ({clip(task.name)}), methods ({entry.label})"
            of_task = self._source.places_under("tasks", at, "methods", entry.label)
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
        if matched and takes is not None and takes.takes_density(spelled_out(method)):
            if said.get("entries") is not None:  # LoRA refuses this key, since it has ranks
                method["entries"] = said["entries"]
            else:
                density = said.get("density")
                method["density"] = 0.01 if density is None else density
        data: dict[str, Any] = {"method": method, "train": dict(entry.train)}
        data["calibration"] = dict(entry.calibration)
        data["targets"] = dict(entry.targets)
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


def _runs_written_twice(cells: list[Cell], source: str) -> list[Problem]:
    met = Counter((cell.task, cell.label, cell.seed) for cell in cells)
    twice = [f"{task} {label} seed {seed}" for (task, label, seed), n in met.items() if n > 1]
    if not twice:
        return []
    what = f"two runs are the same: {twice[0]}"
    return [Place(source).problem("seeds, tasks", what, "name each once")]


def _shared_decay(study: Study, cells: list[Cell]) -> list[Problem]:
    """Return the problem of one weight decay for rows on which it acts differently, in tuning.

    Weight decay pulls the weights of full fine-tuning towards zero, and the effective weights of
    LoRA or a core towards their initial values. One value cannot suit both.
    """
    key = "train.weight_decay"
    tuned = [] if study.tune is None else study.tune.keys()
    if not tuned or key in tuned:  # a row whose decay is tuned has its own value
        return []
    own = {entry.label for entry in study.methods if "weight_decay" in entry.train}
    for task in study.tasks:
        own |= {label for label, train in task.methods.items() if "weight_decay" in train}
    shared = [c for c in cells if c.label not in own and c.loaded.recipe.train.weight_decay]
    kinds = {cell.loaded.recipe.method.beside_weights: cell for cell in shared}
    if len(kinds) < 2:
        return []
    decay = kinds[True].loaded.recipe.train.weight_decay
    what = (
        f"{decay:g} is shared by {kinds[False].label}, whose weights it pulls towards zero, and "
        f"{kinds[True].label}, whose weights it pulls towards their values before training"
    )
    place = find_place(kinds[True].loaded.places, ("train", "weight_decay"))
    fix = "tune it (tune.space.weight_decay), or set it in each row and name it under differ"
    return [place.problem(key, what, fix)]


def _idle_everywhere(found: list[Found], cells: int) -> list[Found]:
    """Return the settings that have no effect in any run, each once."""
    count = Counter((each.idle.key, each.place) for each in found)
    everywhere = [each for each in found if count[each.idle.key, each.place] == cells]
    return list({each.idle.key: each for each in everywhere}.values())
