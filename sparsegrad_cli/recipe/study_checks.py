"""Check a study before the recipes of its runs are checked. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sparsegrad_cli.errors import Problem, RecipeError
from sparsegrad_cli.io.suggest import suggest
from sparsegrad_cli.methods.registry import SIZE_KEYS, settings_class
from sparsegrad_cli.recipe.load_recipe import with_settings
from sparsegrad_cli.recipe.schema import Recipe
from sparsegrad_cli.recipe.study_section import TUNING_SEED, MethodEntry, Range, Study
from sparsegrad_cli.recipe.yaml_source import (
    COMMAND_LINE,
    KeyPath,
    Layer,
    Place,
    find_place,
    shorten,
)

_MOST_RUNS = 2000
_SET_BY_STUDY = "is set by the comparison for each of its runs"
# Keys that a comparison sets for each of its runs, and what to write instead.
_INSTEAD_OF_OVERRIDES = {
    "seed": "use --seeds, or seeds in a study",
    "output_dir": "use --output-dir for the comparison; its runs are stored in it",
    "method": "name methods by --methods or in a study, and set method.density=0.02, for example",
    "method.name": "use --methods, or methods in a study",
}
_INSTEAD_OF_SETTINGS = {
    "seed": "use seeds of the study",
    "output_dir": "use output_dir of the study; its runs are stored in it",
    "match": "use match of the study",
}


def row_problems(study: Study, source: str) -> list[Problem]:
    """Return the problems of a study's rows as a whole.

    Raises:
        RecipeError: the study has too many runs to check them one by one.
    """
    place, problems = Place(source), []
    count = max(1, len(study.tasks)) * len(study.seeds) * len(study.methods)
    if count > _MOST_RUNS:
        what = f"expected at most {_MOST_RUNS:,} runs, got {count:,}"
        raise RecipeError([place.problem("(file)", what)])
    labels = [entry.label for entry in study.methods]
    for number, task in enumerate(study.tasks):
        for label in sorted(set(task.methods) - set(labels)):
            problems.append(_unknown_row(f"tasks[{number}].methods", label, labels, place))
    if len(set(labels)) != len(labels):
        what = "two rows have the same label: give each its own"
        problems.append(place.problem("methods", what))
    return problems


def _unknown_row(key: str, label: str, labels: list[str], place: Place) -> Problem:
    what = f"{shorten(label)} is not the label of a row of this study"
    return place.problem(key, what, suggest(label, tuple(labels)))


def settings_problems(
    study: Study, source: str, places: Mapping[KeyPath, Place], match_place: Place
) -> list[Problem]:
    """Return problems with ``settings`` that the comparison sets itself, and with ``matched``.

    Args:
        study: the study.
        source: name of the study, for messages.
        places: places of the keys under ``settings``.
        match_place: where ``match`` was written.
    """
    problems = [
        places.get((key,), Place(source)).problem(f"settings.{key}", _SET_BY_STUDY, fix)
        for key, fix in _INSTEAD_OF_SETTINGS.items()
        if key in study.settings
    ]
    unmatched = study.match is None and match_place.file != COMMAND_LINE
    if unmatched and not all(entry.matched for entry in study.methods):
        what = "has no effect: match is null, so no row is matched"
        problems.append(Place(source).problem("methods.matched", what, "leave it out"))
    return problems


def override_problems(study: Study, keys: list[str]) -> list[Problem]:
    """Return problems with overrides that the comparison sets itself, or that no row would use."""
    problems = []
    for key in keys:
        what, fix = _SET_BY_STUDY, _INSTEAD_OF_OVERRIDES.get(key)
        section, _, name = key.partition(".")
        if section == "method" and fix is None and all(name in e.method for e in study.methods):
            what, fix = "is set by every row of the study", "change it there"
        if fix is not None:
            problems.append(Place(COMMAND_LINE).problem(key, what, fix))
    return problems


def rank_problems(study: Study, entry: MethodEntry, resolved: Layer) -> list[Problem]:
    """Return the problem of a LoRA rank in the recipe if parameters are matched by density."""
    said = resolved.data.get("method")
    rank = said.get("rank") if isinstance(said, dict) and _solves_rank(said) else None
    by_density = any(
        row.matched and _chooses_by_density(row.method) and not SIZE_KEYS & set(row.method)
        for row in study.methods
    )
    held = study.match == "trainable" and entry.matched and _solves_rank(entry.method)
    if rank is None or not held or not by_density or SIZE_KEYS & set(entry.method):
        return []
    what = (
        f"the recipe sets LoRA rank {shorten(rank)}, but the other methods train as many "
        "parameters as the density selects, so the numbers would not match"
    )
    fix = "set method.density instead of the rank; or use --match none or --match trainable=N"
    place = find_place(resolved.places, ("method", "rank"))
    return [place.problem("method.rank", what, fix)]


def _solves_rank(method: Mapping[str, Any]) -> bool:
    settings = settings_class(method)
    return settings is not None and settings.solves_rank


def _chooses_by_density(method: Mapping[str, Any]) -> bool:
    settings = settings_class(method)
    return settings is not None and settings.chooses_by_density


def tuning_problems(study: Study, keys: list[str], source: str) -> list[Problem]:
    """Return the problems of a study's ``tune`` section.

    Args:
        study: the study.
        keys: dotted keys that the command line sets.
        source: name of the study, for messages.
    """
    if study.tune is None:
        return []
    tune, place, problems = study.tune, Place(source), []
    seeds = () if isinstance(tune.seeds, str) else tune.seeds
    both = sorted(set(seeds) & set(study.seeds))
    if both:
        what = f"{', '.join(map(str, both))}: tuning must not use the seeds of the reported runs"
        fix = f"use other seeds, such as {max((*study.seeds, TUNING_SEED - 1)) + 1}"
        problems.append(place.problem("tune.seeds", what, fix))
    if len(set(seeds)) < len(seeds):
        problems.append(place.problem("tune.seeds", "names a seed twice"))
    labels = [entry.label for entry in study.methods]
    for label in sorted(set(tune.space.learning_rate.centres) - set(labels)):
        key = "tune.space.learning_rate.centres"
        problems.append(_unknown_row(key, label, labels, place))
    for key in sorted(set(tune.keys()) & set(keys)):
        fix = "leave it out, or take it out of tune.space"
        if key == "train.learning_rate":
            fix = "leave it out, or set tune.space.learning_rate.centres"
        problems.append(Place(COMMAND_LINE).problem(key, "is tuned, so it cannot be set", fix))
    return problems


def row_space_problems(study: Study, recipes: Mapping[str, Recipe], source: str) -> list[Problem]:
    """Return the problems of ``tune.space.rows``.

    Args:
        study: the study.
        recipes: label of a row -> its recipe on some task.
        source: name of the study, for messages.
    """
    rows = study.tune.space.rows if study.tune is not None else {}
    place, problems = Place(source), []
    for label, keys in rows.items():
        if label not in recipes:
            problems.append(_unknown_row("tune.space.rows", label, list(recipes), place))
            continue
        for key, over in keys.items():
            where = f"tune.space.rows.{label}.{key}"
            section, _, name = key.partition(".")
            if key != "train.lora_plus_ratio" and (section != "method" or name in SIZE_KEYS):
                what = "expected a key of the method that is not its size, or train.lora_plus_ratio"
                problems.append(place.problem(where, what, "such as method.rslora"))
                continue
            values = (over.low, over.high) if isinstance(over, Range) else over
            try:
                for value in values:
                    with_settings(recipes[label], {key: value})
            except RecipeError as error:
                first = error.problems[0]
                problems.append(place.problem(where, first.what, first.fix))
    return problems


def test_problems(study: Study, source: str) -> list[Problem]:
    """Return the problems of a study's ``test`` section."""
    test, place, problems = study.test, Place(source), []
    labels = [entry.label for entry in study.methods]
    if test.row is not None and test.row not in labels:
        problems.append(_unknown_row("test.row", test.row, labels, place))
    for label in sorted(set(test.margins) - set(labels)):
        problems.append(_unknown_row("test.margins", label, labels, place))
    if test.margins and (test.row is None or test.over == "seeds"):
        fix = "set test.row, and test.over: seeds_and_examples"
        what = "are margins of test.row, by the test over seeds and examples"
        problems.append(place.problem("test.margins", what, fix))
    if test.row is not None and test.row in test.margins:
        what = f"compare {test.row} with itself"
        problems.append(place.problem("test.margins", what, "name another row"))
    return problems


def holdout_problems(study: Study, recipes: Iterable[Recipe], source: str) -> list[Problem]:
    """Return the problem of a test or tuning that needs a test set, where some run has none."""
    wanted = {
        "test.over": study.test.over == "seeds_and_examples",
        "tune.seeds": study.tune is not None and study.tune.own,
    }
    without = next((recipe.task.name for recipe in recipes if recipe.task.holdout is None), None)
    if without is None:
        return []
    what = f"needs a test set that chooses nothing, and the runs on {without} have none"
    fix = "set task.holdout under settings, such as task: {holdout: 0.1}"
    place = Place(source)
    return [place.problem(key, what, fix) for key, needed in wanted.items() if needed]
