"""Load a study for ``compare``: from a file, or from a recipe and methods. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsegrad_cli.errors import RecipeError
from sparsegrad_cli.methods.registry import ALL_NAMES
from sparsegrad_cli.recipe.layers import anchor_paths, read_override, stack
from sparsegrad_cli.recipe.load_recipe import check
from sparsegrad_cli.recipe.problems import method_advice
from sparsegrad_cli.recipe.shipped import find_recipe, recipe_of_run
from sparsegrad_cli.recipe.study_expansion import (
    Cell,
    LoadedStudy,
    StudySource,
    expand,
)
from sparsegrad_cli.recipe.study_section import SEEDS, Study
from sparsegrad_cli.recipe.yaml_source import COMMAND_LINE, Layer, Place, clip, read_yaml, setting

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
    layer, overrides = _with_options(read_yaml(path, str(source)), overrides, match, trials)
    _anchor_study(layer.data, path.resolve().parent)
    study = check(layer, Study)
    recipe = find_recipe(study.recipe, relative_to=path.resolve().parent)
    if recipe is None:
        place = layer.places.get(("recipe",), Place(str(source)))
        raise RecipeError([place.problem("recipe", f"no such file: {clip(study.recipe)}")])
    matched = layer.places.get(("match",), Place(str(source)))
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
        if method not in ALL_NAMES
    ]
    if len(set(methods)) != len(methods):
        problems.append(_OPTION.problem(option, "names a method twice"))
    if not 1 <= seeds <= len(SEEDS):
        problems.append(_OPTION.problem("--seeds", f"expected 1 to {len(SEEDS)}, got {seeds}"))
    if problems:
        raise RecipeError(problems)
    recipe = source or "configs/quickstart.yaml"
    name = Path(recipe).stem
    if (within := recipe_of_run(recipe)) is not None:
        name, recipe = Path(recipe).resolve().name, str(within)
    data = {"name": _study_name(name), "recipe": recipe, "methods": methods, "seeds": SEEDS[:seeds]}
    layer, overrides = _with_options(Layer(data), overrides, match, trials)
    said = f"{name} from the command line"
    return expand(check(layer, Study), StudySource(said, recipe, overrides, _OPTION))


def _study_name(raw: str) -> str:
    """Return a valid study name for a recipe or run of any name."""
    kept = (c if c.isalpha() or c.isdecimal() or c in "_.+-" else "-" for c in raw)
    return "".join(kept)[:80].lstrip(".-") or "recipe"


def _with_options(
    layer: Layer, overrides: tuple[str, ...], match: str | None, trials: int | None
) -> tuple[Layer, tuple[str, ...]]:
    """Add the study's own keys of the command line to its layer, and return the other overrides.

    ``--match``, ``--tune``, ``match=none``, ``engine=slurm`` and ``engine.slurm.qos=x`` set such
    keys.

    Raises:
        RecipeError: ``match`` is given twice.
    """
    keys = {text: text.partition("=")[0].strip() for text in overrides}
    found = [text for text in overrides if keys[text].partition(".")[0] in ("match", "engine")]
    if match is not None and "match" in keys.values():
        what = f"is given twice, here and as --match {match}"
        raise RecipeError([_OPTION.problem("match", what, "give one of the two")])
    options = [read_override(text) for text in found]
    options += [setting("match", match)] if match is not None else []
    options += [setting("tune.trials", trials)] if trials is not None else []
    written = {key: value for key, value in layer.data.items() if key in ("engine", "tune")}
    layers = [Layer(written, layer.places), *options]
    for each in layers:
        for key, name in (("engine", "name"), ("tune", "trials")):  # short forms of a mapping
            if isinstance(each.data.get(key), str | int):
                each.data[key] = {name: each.data[key]}
    merged = stack(layers)
    layer.data |= merged.data
    layer.places.update(merged.places)
    return layer, tuple(text for text in overrides if text not in found)
