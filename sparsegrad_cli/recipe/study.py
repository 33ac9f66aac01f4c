"""Load a study for ``compare``: from a file, or from a recipe and methods. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsegrad_cli.errors import RecipeError
from sparsegrad_cli.methods.registry import METHOD_NAMES
from sparsegrad_cli.recipe.budget import NOTHING, parse_match
from sparsegrad_cli.recipe.layers import anchor_paths, read_override, stack
from sparsegrad_cli.recipe.load_recipe import check
from sparsegrad_cli.recipe.problems import method_advice
from sparsegrad_cli.recipe.section import SettingError
from sparsegrad_cli.recipe.shipped import find_recipe, recipe_of_run
from sparsegrad_cli.recipe.study_expansion import (
    Cell,
    LoadedStudy,
    StudySource,
    expand,
)
from sparsegrad_cli.recipe.study_section import SEEDS, Study, Tune
from sparsegrad_cli.recipe.yaml_source import COMMAND_LINE, Layer, Place, clip, read_yaml

__all__ = ["Cell", "LoadedStudy", "load_study", "make_study"]
_OPTION = Place(COMMAND_LINE)


def load_study(
    source: str | Path,
    overrides: tuple[str, ...] = (),
    *,
    match: str | None = None,
    trials: int | None = None,
) -> LoadedStudy:
    """Read a study file and check the recipe of every run.

    Args:
        source: the study file.
        overrides: recipe keys for every run, as ``KEY=VALUE``.
        match: overrides the file's ``match``.
        trials: number of tuning trials; overrides the file's, and enables tuning.

    Raises:
        RecipeError: the study has problems; the error lists all of them.
    """
    path = find_recipe(source)
    if path is None:
        raise RecipeError([Place(str(source)).problem("(file)", "no such file")])
    match, overrides = _match_among(overrides, match)
    layer, overrides = _with_engine(read_yaml(path, str(source)), overrides)
    _anchor_study(layer.data, path.resolve().parent)
    study = _with_trials(_with_match(check(layer, Study), match), trials)
    place = layer.places.get(("recipe",), Place(str(source)))
    recipe = find_recipe(study.recipe, relative_to=path.resolve().parent)
    if recipe is None:
        what = f"no such file: {clip(study.recipe)}"
        raise RecipeError([place.problem("recipe", what)])
    matched = _OPTION if match else layer.places.get(("match",), Place(str(source)))
    rows = _entry_of_each_row(layer.data["methods"])
    source_of = StudySource(str(source), str(recipe), overrides, matched, layer.places, rows)
    return expand(study, source_of)


def _entry_of_each_row(entries: list[Any]) -> tuple[int, ...]:
    """Return for each row the index of its entry; learning_rates give an entry several rows."""
    rows: list[int] = []
    for number, entry in enumerate(entries):
        rates = entry.get("learning_rates") if isinstance(entry, dict) else None
        rows += [number] * (len(rates) if isinstance(rates, list) else 1)
    return tuple(rows)


def _anchor_study(data: dict[str, Any], folder: Path) -> None:
    """Make the relative paths of a study, its tasks and its methods absolute."""
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
    """Make a study from the command line, for one recipe or run.

    Args:
        source: a recipe or the folder of a run; by default the quickstart recipe.
        methods: names of methods.
        seeds: number of seeds; the first of the default seeds are used.
        overrides: recipe keys for every run, as ``KEY=VALUE``.
        match: as in a study file; ``trainable`` by default.
        option: the option to name in errors about the methods.
        trials: number of tuning trials; None does not tune.

    Raises:
        RecipeError: a method is unknown or named twice, or the recipe has problems.
    """
    problems = [
        _OPTION.problem(option, f"{method!r} is not a method", method_advice(method))
        for method in methods
        if method not in METHOD_NAMES
    ]
    if len(set(methods)) != len(methods):
        problems.append(_OPTION.problem(option, "names a method twice"))
    if not 1 <= seeds <= len(SEEDS):
        problems.append(_OPTION.problem("--seeds", f"expected 1 to {len(SEEDS)}, got {seeds}"))
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
    said = f"{name} from the command line"
    return expand(study, StudySource(said, recipe, overrides, _OPTION))


def _study_name(raw: str) -> str:
    """Return a valid study name for a recipe or run of any name."""
    kept = (c if c.isalpha() or c.isdecimal() or c in "_.+-" else "-" for c in raw)
    return "".join(kept)[:80].lstrip(".-") or "recipe"


def _with_match(study: Study, match: str | None) -> Study:
    """Return the study with the command line's ``match``; ``none`` there is null in a file."""
    if match is None:
        return study
    try:
        if match not in NOTHING:
            parse_match(match)
    except SettingError as error:
        raise RecipeError([_OPTION.problem("--match", str(error), error.fix)]) from None
    return study.model_copy(update={"match": None if match in NOTHING else match})


def _match_among(
    overrides: tuple[str, ...], match: str | None
) -> tuple[str | None, tuple[str, ...]]:
    """Take ``match=peak=2GiB`` out of the overrides; it means the same as ``--match peak=2GiB``.

    Raises:
        RecipeError: both are given.
    """
    found = [text for text in overrides if text.partition("=")[0].strip() == "match"]
    if found and match is not None:
        what = f"is given twice, here and as --match {match}"
        raise RecipeError([_OPTION.problem("match", what, "give one of the two")])
    rest = tuple(text for text in overrides if text not in found)
    return (found[-1].partition("=")[2].strip() or "null" if found else match), rest


def _with_engine(layer: Layer, overrides: tuple[str, ...]) -> tuple[Layer, tuple[str, ...]]:
    """Move ``engine=slurm`` and ``engine.KEY=VALUE`` from the overrides into the study's layer."""
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
