"""Studies: recipes x methods x tasks x seeds, for ``compare``. Imports no torch."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from sparsegrad_cli.errors import Problem, RecipeError
from sparsegrad_cli.recipe.checks import outside_problems
from sparsegrad_cli.recipe.figures import Figure
from sparsegrad_cli.recipe.layers import read_layers, stack
from sparsegrad_cli.recipe.loading import LoadedRecipe, check
from sparsegrad_cli.recipe.method_section import METHOD_NAMES
from sparsegrad_cli.recipe.problems import did_you_mean
from sparsegrad_cli.recipe.schema import Recipe
from sparsegrad_cli.recipe.section import Section, Seed
from sparsegrad_cli.recipe.shipped import find_recipe
from sparsegrad_cli.recipe.source import KeyPath, Layer, Place, clip, parse_override, read_yaml
from sparsegrad_cli.recipe.tuning import Tune, tuning_problems
from sparsegrad_cli.recipe.yaml_text import shorten

_MOST_CELLS, _MOST_PROBLEMS = 2000, 100
# The paper's seeds first, then a plain sequence.
SEEDS = (42, 3705, 2023, 1, 2, 3, 4, 5, 6, 7)


class MethodEntry(Section):
    """One row of the comparison: a method, and what it changes in the recipe.

    ``lora`` alone is short for ``{label: lora, method: {name: lora}}``; an entry with
    ``learning_rates: [1e-3, 2e-3]`` is short for two rows, ``lora-1e-3`` and ``lora-2e-3``.
    """

    label: str = Field(min_length=1, max_length=80, pattern=r"^[\w.+-]+$")
    method: dict[str, Any]
    train: dict[str, Any] = {}
    calibration: dict[str, Any] = {}


class TaskEntry(Section):
    """One task: its name, and what it changes in the recipe (``task``, ``train``).

    ``methods`` maps a method's label to what ``train`` is for it on this task: a learning rate
    that was tuned there.
    """

    name: str
    task: dict[str, Any] = {}
    train: dict[str, Any] = {}
    methods: dict[str, dict[str, Any]] = {}


class Study(Section):
    """What a study file may say."""

    name: str = Field("comparison", max_length=80, pattern=r"^[\w.+-]+$")
    recipe: str = "configs/quickstart.yaml"
    methods: tuple[MethodEntry, ...] = Field(min_length=1)
    tasks: tuple[TaskEntry, ...] = ()
    seeds: tuple[Seed, ...] = Field(SEEDS[:2], min_length=1)
    match: Literal["trainable"] | None = "trainable"
    settings: dict[str, Any] = Field({}, description="recipe keys for every cell")
    differ: tuple[str, ...] = Field(
        (),
        description="recipe keys that may differ between methods, beside method, calibration and "
        "learning rate; the report flags them",
    )
    tune: Tune | None = Field(None, description="tune every method alike before its cells run")
    output_dir: str | None = None
    figures: tuple[Figure, ...] = ()

    @field_validator("methods", mode="before")
    @classmethod
    def _short_methods(cls, value: Any) -> Any:
        if not isinstance(value, tuple):
            return value
        return tuple(row for v in value for row in _by_rate(_method_entry(v)))

    @field_validator("tasks", mode="before")
    @classmethod
    def _short_tasks(cls, value: Any) -> Any:
        if not isinstance(value, tuple):
            return value
        return tuple({"name": v} if isinstance(v, str) else v for v in value)

    @field_validator("tune", mode="before")
    @classmethod
    def _short_tune(cls, value: Any) -> Any:
        return {"trials": value} if isinstance(value, int) else value


def _method_entry(value: Any) -> Any:
    if isinstance(value, str):
        return {"label": value, "method": {"name": value}}
    if isinstance(value, dict):
        value = dict(value)
        if isinstance(value.get("method"), str):
            value["method"] = {"name": value["method"]}
        if "label" not in value and isinstance(value.get("method"), dict):
            value["label"] = str(value["method"].get("name", ""))
    return value


def _by_rate(entry: Any) -> list[Any]:
    """One row per learning rate, if the entry names several."""
    if not isinstance(entry, dict) or not isinstance(entry.get("learning_rates"), tuple):
        return [entry]
    rest = {key: value for key, value in entry.items() if key != "learning_rates"}
    train = rest.get("train") or {}
    if not isinstance(train, dict):
        return [rest]
    return [
        {
            **rest,
            "label": f"{rest.get('label', '')}-{_short(rate)}",
            "train": {**train, "learning_rate": rate},
        }
        for rate in entry["learning_rates"]
    ]


def _short(rate: Any) -> str:
    """0.0005 -> 5e-4."""
    if not isinstance(rate, float) or not math.isfinite(rate):
        return str(rate)
    digits, exponent = f"{rate:e}".split("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"


@dataclass(frozen=True)
class Cell:
    """One run of a comparison."""

    task: str
    label: str
    seed: int
    loaded: LoadedRecipe


@dataclass(frozen=True)
class LoadedStudy:
    """A checked study with a checked recipe for every cell, tasks outermost, then seeds."""

    study: Study
    source: str
    cells: tuple[Cell, ...]


def load_study(
    source: str | Path, overrides: tuple[str, ...] = (), *, trials: int | None = None
) -> LoadedStudy:
    """Read a study file and check every cell's recipe.

    ``overrides`` are recipe keys for every cell, ``trials`` are those of tuning, if there is any.

    Raises:
        RecipeError: everything that is wrong, together.
    """
    path = find_recipe(source)
    if path is None:
        raise RecipeError([Problem("(file)", "no such file", file=str(source))])
    layer = read_yaml(path, str(source))
    study = _with_trials(check(layer, Study), trials)
    place = layer.places.get(("recipe",), Place(str(source)))
    recipe = find_recipe(study.recipe, relative_to=path.resolve().parent)
    if recipe is None:
        what = f"no such file: {clip(study.recipe)}"
        raise RecipeError([Problem("recipe", what, place.file, place.line)])
    return expand(study, str(source), str(recipe), overrides)


def make_study(
    source: str | None,
    methods: tuple[str, ...],
    seeds: int,
    overrides: tuple[str, ...],
    *,
    option: str = "--methods",
    trials: int | None = None,
) -> LoadedStudy:
    """A study from the command line: one recipe, some methods by name, the first n seeds.

    ``option`` is what to blame for the methods, ``trials`` are those of tuning, if there is any.

    Raises:
        RecipeError: an unknown or repeated method, or a broken recipe.
    """
    problems = [
        Problem(
            option,
            f"{m!r} is not a method",
            "command line",
            None,
            did_you_mean(m, METHOD_NAMES),
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
    recipe = source or "configs/quickstart.yaml"
    name = Path(recipe).stem
    data = {"name": name, "recipe": recipe, "methods": methods, "seeds": SEEDS[:seeds]}
    study = _with_trials(Study.model_validate(data), trials)
    return expand(study, f"{name} from the command line", recipe, overrides)


def _with_trials(study: Study, trials: int | None) -> Study:
    if trials is None:
        return study
    tune = (study.tune or Tune()).model_copy(update={"trials": trials})
    return study.model_copy(update={"tune": tune})


def expand(study: Study, source: str, recipe: str, overrides: tuple[str, ...]) -> LoadedStudy:
    """One checked recipe per cell; problems of all cells are reported once each."""
    base = read_layers(recipe)
    over = [parse_override(text) for text in overrides]
    tasks = study.tasks or (None,)
    problems = _of_rows(study, source)
    cells: list[Cell] = []
    for task, seed, entry in itertools.product(tasks, study.seeds, study.methods):
        if len(problems) > _MOST_PROBLEMS:
            break
        layers = [*base, *_cell_layers(study, source, task, seed, over)]
        layers.append(_method_layer(entry, source, stack(layers).data, study.match))
        if task is not None and entry.label in task.methods:
            where = f"tasks ({clip(task.name)}), methods ({entry.label})"
            layers.append(_layer({"train": dict(task.methods[entry.label])}, source, where))
        try:
            loaded = _checked(layers, source)
            cells.append(Cell(loaded.recipe.task.name, entry.label, seed, loaded))
        except RecipeError as error:
            problems.update({f"{p.where} {p.what}": p for p in error.problems})
    met = Counter((cell.task, cell.label, cell.seed) for cell in cells)
    twice = [f"{task} {label} seed {seed}" for (task, label, seed), n in met.items() if n > 1]
    if twice and not problems:
        what = f"two runs are one and the same: {twice[0]}"
        problems["twice"] = Problem("seeds, tasks", what, source, None, "name each once")
    if study.tune is not None:
        keys = [text.partition("=")[0].strip() for text in overrides]
        labels = [entry.label for entry in study.methods]
        for problem in tuning_problems(study.tune, study.seeds, labels, keys, source):
            problems[f"{problem.where} {problem.what}"] = problem
    if problems:
        raise RecipeError(list(problems.values()))
    return LoadedStudy(study, source, tuple(cells))


def _of_rows(study: Study, source: str) -> dict[str, Problem]:
    """What is wrong with the rows of a study before any is looked at."""
    problems: dict[str, Problem] = {}
    count = max(1, len(study.tasks)) * len(study.seeds) * len(study.methods)
    if count > _MOST_CELLS:
        what = f"has {count:,} runs; more than {_MOST_CELLS:,} are no study"
        raise RecipeError([Problem("(file)", what, source)])
    labels = [entry.label for entry in study.methods]
    for number, task in enumerate(study.tasks):
        for label in sorted(set(task.methods) - set(labels)):
            what = f"{shorten(label)} is no row of this study"
            hint = did_you_mean(label, tuple(labels))
            key = f"tasks[{number}].methods"
            problems[f"{number} {label}"] = Problem(key, what, source, None, hint)
    if len(set(labels)) != len(labels):
        what = "two rows have one label: give each its own"
        problems["labels"] = Problem("methods", what, source)
    return problems


def _cell_layers(
    study: Study, source: str, task: TaskEntry | None, seed: int, over: list[Layer]
) -> list[Layer]:
    layers = [_layer(dict(study.settings), source, "settings")]
    if task is not None:
        data = {"task": {"name": task.name, **task.task}, "train": dict(task.train)}
        layers.append(_layer(data, source, f"tasks ({clip(task.name)})"))
    layers += over
    layers.append(_layer({"seed": seed, "output_dir": None}, source, "seeds"))
    return layers


def _method_layer(
    entry: MethodEntry, source: str, resolved: dict[str, Any], match: str | None
) -> Layer:
    """The method's own settings; with ``match``, the recipe's density is everyone's one number."""
    method = dict(entry.method)
    settings = resolved.get("method")
    if isinstance(settings, dict) and method.get("name") == settings.get("name"):
        method = {**settings, **method}
    density = settings.get("density") if isinstance(settings, dict) else None
    matched = match is not None and "rank" not in method and "density" not in method
    if matched and method.get("name") != "full":
        method["density"] = density if density is not None else 0.01
    data: dict[str, Any] = {"method": method, "train": dict(entry.train)}
    data["calibration"] = dict(entry.calibration)
    if method.get("name") == "lora":
        data["match"] = "trainable" if method.get("density") is not None else None
    return _layer(data, source, f"methods ({entry.label})")


def _layer(data: dict[str, Any], source: str, key: str) -> Layer:
    places: dict[KeyPath, Place] = {(name,): Place(f"{source}: {key}") for name in data}
    return Layer(data, places)


def _checked(layers: list[Layer], source: str) -> LoadedRecipe:
    layer = stack(layers)
    recipe = check(layer, Recipe)
    problems = outside_problems(recipe, layer.places)
    if problems:
        raise RecipeError(problems)
    return LoadedRecipe(recipe, source, layer.places)
