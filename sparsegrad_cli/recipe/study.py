"""Studies: recipes x methods x tasks x seeds, for ``compare``. Imports no torch."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsegrad_cli.errors import Problem, RecipeError
from sparsegrad_cli.methods.registry import METHOD_NAMES, settings_class
from sparsegrad_cli.recipe.budget import NOTHING, MisspeltError, parse_match
from sparsegrad_cli.recipe.checks import outside_problems
from sparsegrad_cli.recipe.effects import Found, without_idle
from sparsegrad_cli.recipe.layers import anchor_paths, read_layers, read_override, stack, still_said
from sparsegrad_cli.recipe.load_recipe import LoadedRecipe, check
from sparsegrad_cli.recipe.problems import method_advice
from sparsegrad_cli.recipe.schema import Recipe
from sparsegrad_cli.recipe.shipped import find_recipe, recipe_of_run
from sparsegrad_cli.recipe.source import (
    COMMAND_LINE,
    KeyPath,
    Layer,
    Place,
    clip,
    find_place,
    places_of,
    read_yaml,
)
from sparsegrad_cli.recipe.study_checks import (
    SIZES,
    of_overrides,
    of_rows,
    of_settings,
    unmatched_rank,
)
from sparsegrad_cli.recipe.study_section import SEEDS, MethodEntry, Study, TaskEntry
from sparsegrad_cli.recipe.tuning import Tune, tuning_problems

_MOST_PROBLEMS = 100
_LAST = {"train", "calibration"}  # of these the command line has the last word, for all rows


@dataclass(frozen=True)
class Cell:
    """One run of a comparison."""

    task: str
    label: str
    seed: int
    loaded: LoadedRecipe


_DEFAULTS, _OPTION = Place("defaults"), Place(COMMAND_LINE)


@dataclass(frozen=True)
class LoadedStudy:
    """A checked study with a checked recipe for every cell, tasks outermost, then seeds.

    Attributes:
        match_place: where ``match`` was written.
        budget: once the budget is solved, what was picked: that block of compare.json.
        notes: settings of the command line that have no effect in any cell.
    """

    study: Study
    source: str
    cells: tuple[Cell, ...]
    match_place: Place = _DEFAULTS
    budget: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()


def load_study(
    source: str | Path,
    overrides: tuple[str, ...] = (),
    *,
    match: str | None = None,
    trials: int | None = None,
) -> LoadedStudy:
    """Read a study file and check every cell's recipe.

    ``overrides`` are recipe keys for every cell, ``match`` is stronger than the file's, ``trials``
    are those of tuning, if there is any.

    Raises:
        RecipeError: everything that is wrong, together.
    """
    path = find_recipe(source)
    if path is None:
        raise RecipeError([Problem("(file)", "no such file", file=str(source))])
    match, overrides = _match_among(overrides, match)
    layer, overrides = _with_engine(read_yaml(path, str(source)), overrides)
    _anchor_study(layer.data, path.resolve().parent)
    study = _with_trials(_with_match(check(layer, Study), match), trials)
    place = layer.places.get(("recipe",), Place(str(source)))
    recipe = find_recipe(study.recipe, relative_to=path.resolve().parent)
    if recipe is None:
        what = f"no such file: {clip(study.recipe)}"
        raise RecipeError([Problem("recipe", what, place.file, place.line)])
    matched = _OPTION if match else layer.places.get(("match",), Place(str(source)))
    return expand(study, str(source), str(recipe), overrides, matched, _Lines.of(layer, study))


def _anchor_study(data: dict[str, Any], folder: Path) -> None:
    """Make the relative paths of a study absolute: its own, and those of tasks and methods."""
    for part in (data, data.get("settings"), data.get("tasks"), data.get("methods")):
        for keys in part if isinstance(part, list) else [part]:
            if isinstance(keys, dict):
                anchor_paths(keys, folder)


def make_study(
    source: str | None,
    methods: tuple[str, ...],
    seeds: int,
    overrides: tuple[str, ...],
    *,
    match: str | None = None,
    option: str = "--methods",
    trials: int | None = None,
) -> LoadedStudy:
    """A study from the command line: one recipe or run, some methods by name, the first n seeds.

    ``match`` is as in a file, ``trainable`` by default; ``option`` is what to blame for the
    methods, ``trials`` are those of tuning, if there is any.

    Raises:
        RecipeError: an unknown or repeated method, or a broken recipe.
    """
    problems = [
        Problem(
            option,
            f"{m!r} is not a method",
            "command line",
            None,
            method_advice(m),
        )
        for m in methods
        if m not in METHOD_NAMES
    ]
    if len(set(methods)) != len(methods):
        problems.append(Problem(option, "names a method twice", "command line"))
    if not 1 <= seeds <= len(SEEDS):
        problems.append(Problem("--seeds", f"is 1 to {len(SEEDS)}", "command line"))
    if problems:
        raise RecipeError(problems)
    match, overrides = _match_among(overrides, match)
    recipe = source or "configs/quickstart.yaml"
    name = Path(recipe).stem
    if (within := recipe_of_run(recipe)) is not None:
        name, recipe = Path(recipe).resolve().name, str(within)
    data = {"name": _study_name(name), "recipe": recipe, "methods": methods, "seeds": SEEDS[:seeds]}
    layer, overrides = _with_engine(Layer(data), overrides)
    study = _with_trials(_with_match(check(layer, Study), match), trials)
    return expand(study, f"{name} from the command line", recipe, overrides, _OPTION)


def _study_name(raw: str) -> str:
    """What is named so, as a study may be called."""
    kept = (c if c.isalpha() or c.isdecimal() or c in "_.+-" else "-" for c in raw)
    return "".join(kept)[:80].lstrip(".-") or "recipe"


def _with_match(study: Study, match: str | None) -> Study:
    """With what the command line matches by; ``none`` there is null in a file."""
    if match is None:
        return study
    try:
        if match not in NOTHING:
            parse_match(match)
    except MisspeltError as error:
        problem = Problem("--match", str(error), _OPTION.file, None, error.fix)
        raise RecipeError([problem]) from None
    return study.model_copy(update={"match": None if match in NOTHING else match})


def _match_among(
    overrides: tuple[str, ...], match: str | None
) -> tuple[str | None, tuple[str, ...]]:
    """Take ``match=peak=2GiB`` out of the overrides: it says the same as ``--match peak=2GiB``.

    Raises:
        RecipeError: both are given.
    """
    found = [text for text in overrides if text.partition("=")[0].strip() == "match"]
    if found and match is not None:
        what = f"says what --match {match} says, too"
        raise RecipeError([Problem("match", what, COMMAND_LINE, None, "give one of the two")])
    rest = tuple(text for text in overrides if text not in found)
    return (found[-1].partition("=")[2].strip() or "null" if found else match), rest


def _with_engine(layer: Layer, overrides: tuple[str, ...]) -> tuple[Layer, tuple[str, ...]]:
    """Take ``engine=slurm`` and ``engine.KEY=VALUE`` out of the overrides, into a study's layer."""
    keys = {text: text.partition("=")[0].strip() for text in overrides}
    found = [text for text in overrides if keys[text].partition(".")[0] == "engine"]
    if not found:
        return layer, overrides
    layers = [Layer({"engine": layer.data.get("engine", {})}, layer.places)]
    layers += [
        read_override(f"engine.name={text.partition('=')[2]}" if keys[text] == "engine" else text)
        for text in found
    ]
    for each in layers:  # `engine: slurm` is short for a mapping with a name
        if isinstance(each.data["engine"], str):
            each.data["engine"] = {"name": each.data["engine"]}
    merged = stack(layers)
    layer.data["engine"] = merged.data["engine"]
    layer.places.update(merged.places)
    return layer, tuple(text for text in overrides if text not in found)


def _with_trials(study: Study, trials: int | None) -> Study:
    if trials is None:
        return study
    tune = (study.tune or Tune()).model_copy(update={"trials": trials})
    return study.model_copy(update={"tune": tune})


@dataclass(frozen=True)
class _Lines:
    """Where the keys of a study's file were written.

    Attributes:
        places: key path in the file -> place.
        rows: number of each row's entry under ``methods``, which may name several rows.
    """

    places: Mapping[KeyPath, Place] = field(default_factory=dict)
    rows: tuple[int, ...] = ()

    @staticmethod
    def of(layer: Layer, study: Study) -> _Lines:
        """The lines of a file that has been read."""
        rows: list[int] = []
        for number, entry in enumerate(layer.data["methods"]):
            rates = entry.get("learning_rates") if isinstance(entry, dict) else None
            rows += [number] * (len(rates) if isinstance(rates, list) else 1)
        return _Lines(layer.places, tuple(rows))

    def under(self, *prefix: str | int) -> dict[KeyPath, Place]:
        """The places below a key, by the path that is left."""
        size = len(prefix)
        return {p[size:]: at for p, at in self.places.items() if p[:size] == prefix and p[size:]}

    def of_row(self, number: int) -> dict[KeyPath, Place]:
        """The places of a row's keys; none where rows come from the command line."""
        return self.under("methods", self.rows[number]) if self.rows else {}


def expand(
    study: Study,
    source: str,
    recipe: str,
    overrides: tuple[str, ...],
    match_place: Place,
    lines: _Lines | None = None,
) -> LoadedStudy:
    """One checked recipe per cell; problems of all cells are reported once each."""
    lines = lines or _Lines()
    base = read_layers(recipe)
    over = [read_override(text) for text in overrides]
    keys = [text.partition("=")[0].strip() for text in overrides]
    tasks = tuple(enumerate(study.tasks)) or ((-1, None),)
    problems = of_rows(study, source) | of_overrides(study, keys)
    problems |= of_settings(study, source, lines.under("settings"), match_place)
    cells: list[Cell] = []
    without_effect: list[Found] = []
    rows = tuple(enumerate(study.methods))
    for (at, task), seed, (row, entry) in itertools.product(tasks, study.seeds, rows):
        if len(problems) > _MOST_PROBLEMS:
            break
        layers = [*base, *_cell_layers(study, source, task, seed, over, lines, at)]
        match = study.match if entry.matched else None
        resolved = stack(layers)
        problems.update(unmatched_rank(study, entry, resolved))
        layers.append(_method_layer(entry, source, resolved.data, match, lines.of_row(row)))
        if task is not None and entry.label in task.methods:
            where = f"tasks ({clip(task.name)}), methods ({entry.label})"
            of_task = lines.under("tasks", at, "methods", entry.label)
            said = {("train", *path): place for path, place in of_task.items()}
            layers.append(_layer({"train": dict(task.methods[entry.label])}, source, where, said))
        layers += [layer for layer in over if _LAST & set(layer.data)]  # what rows say is weaker
        try:
            loaded, idle = _checked(layers, source)
            cells.append(Cell(loaded.recipe.task.name, entry.label, seed, loaded))
            without_effect += [found for found in idle if found.place.strength >= 2 * len(base)]
        except RecipeError as error:
            problems.update({f"{p.where} {p.what}": p for p in error.problems})
    everywhere = _idle_everywhere(without_effect, len(cells))
    problems.update({f"idle {e.idle.key}": e.problem() for e in everywhere if not e.lenient})
    met = Counter((cell.task, cell.label, cell.seed) for cell in cells)
    twice = [f"{task} {label} seed {seed}" for (task, label, seed), n in met.items() if n > 1]
    if twice and not problems:
        what = f"two runs are one and the same: {twice[0]}"
        problems["twice"] = Problem("seeds, tasks", what, source, None, "name each once")
    if study.tune is not None:
        problems.update(_shared_decay(study, cells))
        labels = [entry.label for entry in study.methods]
        for problem in tuning_problems(study.tune, study.seeds, labels, keys, source):
            problems[f"{problem.where} {problem.what}"] = problem
    if problems:
        raise RecipeError(list(problems.values()))
    notes = tuple(each.note() for each in everywhere if each.lenient)
    return LoadedStudy(study, source, tuple(cells), match_place, notes=notes)


def _shared_decay(study: Study, cells: list[Cell]) -> dict[str, Problem]:
    """One weight decay for rows that it pulls to different places, in a tuned comparison.

    It pulls full fine-tuning's weights towards zero, and the weights under LoRA or a core towards
    what they were: one number cannot be the right one for both.
    """
    assert study.tune is not None
    key = "train.weight_decay"
    tuned = study.tune.keys()
    if key in tuned:  # every row then has its own
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
    """Settings of the study, or beside it, that have no effect in any cell; each once."""
    count = Counter((each.idle.key, each.place) for each in found)
    everywhere = [each for each in found if count[each.idle.key, each.place] == cells]
    return list({each.idle.key: each for each in everywhere}.values())


def _cell_layers(
    study: Study,
    source: str,
    task: TaskEntry | None,
    seed: int,
    over: list[Layer],
    lines: _Lines,
    number: int,
) -> list[Layer]:
    layers = [_layer(dict(study.settings), source, "settings", lines.under("settings"))]
    if task is not None:
        data = {"task": {"name": task.name, **task.task}, "train": dict(task.train)}
        where = f"tasks ({clip(task.name)})"
        layers.append(_layer(data, source, where, lines.under("tasks", number)))
    layers += over
    layers.append(_layer({"seed": seed, "output_dir": None}, source, "seeds"))
    return layers


def _method_layer(
    entry: MethodEntry,
    source: str,
    resolved: dict[str, Any],
    match: str | None,
    lines: Mapping[KeyPath, Place],
) -> Layer:
    """The method's own settings; with ``match``, the recipe's density is everyone's one number.

    A budget starts from there.
    """
    method = dict(entry.method)
    settings = resolved.get("method")
    said = settings if isinstance(settings, dict) else {}
    if method.get("name") == said.get("name"):
        method = {**still_said(said, method), **method}
    matched = match is not None and not SIZES & set(method)
    takes = settings_class(method)
    if matched and takes is not None and "density" in takes.model_fields:
        if said.get("entries") is not None:  # which LoRA then refuses: it has ranks
            method["entries"] = said["entries"]
        else:
            density = said.get("density")
            method["density"] = 0.01 if density is None else density
    data: dict[str, Any] = {"method": method, "train": dict(entry.train)}
    data["calibration"] = dict(entry.calibration)
    written = {**data, "method": dict(entry.method)}
    if takes is not None and takes.solves_rank:
        data["match"] = "trainable" if method.get("density") is not None else None
    return _layer(data, source, f"methods ({entry.label})", lines, written)


def _layer(
    data: dict[str, Any],
    source: str,
    key: str,
    lines: Mapping[KeyPath, Place] | None = None,
    written: dict[str, Any] | None = None,
) -> Layer:
    """A layer that the study makes.

    Args:
        key: of the study, where a key has no line.
        lines: where its keys were written, where that is known.
        written: the part of the data that the study's file says; by default all.
    """
    place = Place(f"{source}: {key}")
    places: dict[KeyPath, Place] = {(name,): place for name in data}
    places |= places_of(data if written is None else written, place)
    return Layer(data, {path: (lines or {}).get(path, at) for path, at in places.items()})


def _checked(layers: list[Layer], source: str) -> tuple[LoadedRecipe, list[Found]]:
    """The recipe of a cell, and the settings in it that have no effect for this one method."""
    layer = stack(layers)
    said = check(layer, Recipe)
    recipe, idle = without_idle(said, layer)
    problems = [found.problem() for found in idle if found.refused]
    problems += outside_problems(said if problems else recipe, layer.places)
    if problems:
        raise RecipeError(problems)
    return LoadedRecipe(recipe, source, layer.places), idle
