"""Check a study before the recipes of its runs are checked. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsegrad_cli.errors import Problem, RecipeError
from sparsegrad_cli.io.suggest import suggest
from sparsegrad_cli.methods.registry import SIZE_KEYS, settings_class
from sparsegrad_cli.recipe.study_section import MethodEntry, Study
from sparsegrad_cli.recipe.yaml_source import COMMAND_LINE, KeyPath, Layer, Place, shorten

_MOST_CELLS = 2000
# Keys that a comparison sets for each of its runs, and what to write in their place.
_OURS = {
    "seed": "a comparison has seeds of its own: --seeds, or seeds in a study",
    "output_dir": "--output-dir for the comparison; its runs lie in it",
    "method": "name methods by --methods or in a study; settings are written method.density=0.02",
    "method.name": "--methods, or methods in a study",
}


def of_rows(study: Study, source: str) -> dict[str, Problem]:
    """Return the problems of a study's rows as a whole."""
    problems: dict[str, Problem] = {}
    count = max(1, len(study.tasks)) * len(study.seeds) * len(study.methods)
    if count > _MOST_CELLS:
        what = f"has {count:,} runs; more than {_MOST_CELLS:,} are no study"
        raise RecipeError([Problem("(file)", what, source)])
    labels = [entry.label for entry in study.methods]
    for number, task in enumerate(study.tasks):
        for label in sorted(set(task.methods) - set(labels)):
            what = f"{shorten(label)} is no row of this study"
            hint = suggest(label, tuple(labels))
            key = f"tasks[{number}].methods"
            problems[f"{number} {label}"] = Problem(key, what, source, None, hint)
    if len(set(labels)) != len(labels):
        what = "two rows have one label: give each its own"
        problems["labels"] = Problem("methods", what, source)
    return problems


def of_settings(
    study: Study, source: str, places: Mapping[KeyPath, Place], match_place: Place
) -> dict[str, Problem]:
    """Return problems with ``settings`` that the comparison sets itself, and with ``matched``.

    Args:
        study: the study.
        source: name of the study, for messages.
        places: places of the keys under ``settings``.
        match_place: where ``match`` was written.
    """
    problems = {}
    fixes = {
        "seed": "seeds of the study",
        "output_dir": "output_dir of the study; its runs lie in it",
        "match": "match of the study",
    }
    for key in sorted(fixes.keys() & study.settings.keys()):
        place = places.get((key,), Place(source))
        what = "is the comparison's to set, for each of its runs"
        problems[key] = Problem(f"settings.{key}", what, place.file, place.line, fixes[key])
    unmatched = study.match is None and match_place.file != COMMAND_LINE
    if unmatched and not all(entry.matched for entry in study.methods):
        what = "has no effect: match is null, so no row is matched"
        problems["matched"] = Problem("methods.matched", what, source, None, "leave it out")
    return problems


def of_overrides(study: Study, keys: list[str]) -> dict[str, Problem]:
    """Return problems with overrides that the comparison sets itself, or that no row would use."""
    problems = {}
    for key in keys:
        what, fix = "is the comparison's to set, for each of its runs", _OURS.get(key)
        section, _, name = key.partition(".")
        if section == "method" and fix is None and all(name in e.method for e in study.methods):
            what, fix = "is set by every row of the study", "change it there"
        if fix is not None:
            problems[key] = Problem(key, what, COMMAND_LINE, None, fix)
    return problems


def unmatched_rank(study: Study, entry: MethodEntry, resolved: Layer) -> dict[str, Problem]:
    """Return the problem of a LoRA rank in the recipe if parameters are matched by density."""
    said = resolved.data.get("method")
    rank = said.get("rank") if isinstance(said, dict) and _solves_rank(said) else None
    by_density = any(
        row.matched and _chooses_by_density(row.method) and not SIZE_KEYS & set(row.method)
        for row in study.methods
    )
    held = study.match == "trainable" and entry.matched and _solves_rank(entry.method)
    if rank is None or not held or not by_density or SIZE_KEYS & set(entry.method):
        return {}
    what = (
        f"the recipe gives LoRA rank {shorten(rank)}, the other methods have the entries of the "
        "density: that would match nothing"
    )
    fix = "method.density in place of the rank, which then follows; or --match none or trainable=N"
    place = resolved.places.get(("method", "rank"), Place("defaults"))
    return {"rank": Problem("method.rank", what, place.file, place.line, fix)}


def _solves_rank(method: Mapping[str, Any]) -> bool:
    settings = settings_class(method)
    return settings is not None and settings.solves_rank


def _chooses_by_density(method: Mapping[str, Any]) -> bool:
    settings = settings_class(method)
    return settings is not None and settings.chooses_by_density
