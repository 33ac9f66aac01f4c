"""What a budget cannot be held to, and what cannot be said beside one: as errors."""

from __future__ import annotations

import math

from sparsegrad_cli.errors import Problem, RecipeError
from sparsegrad_cli.recipe.budget import Budget
from sparsegrad_cli.recipe.source import COMMAND_LINE
from sparsegrad_cli.recipe.study import Cell, LoadedStudy
from sparsegrad_cli.report.units import format_amount
from sparsegrad_cli.study.budget.solve import UnreachableError


def too_little(study: LoadedStudy, budget: Budget, cell: Cell, error: UnreachableError) -> Problem:
    """That not even the smallest size of a method fits, with what would be enough."""
    kind, place = budget.kind, study.match_place
    option = place.file == COMMAND_LINE
    ways = [f"allow {kind}={_enough(budget, error.takes)}", error.fix]
    if option:
        ways.append(f"leave {cell.label} out")
    else:
        ways.append("`matched: false` in its row, which then runs outside of the budget")
    return Problem(
        "--match" if option else "match",
        f"{budget.text} is too little for {cell.label} on {cell.task}: at its smallest "
        f"({error.size}) it takes {format_amount(error.takes, kind)}",
        place.file,
        place.line,
        "; or ".join(way for way in ways if way),
    )


def _enough(budget: Budget, takes: float) -> str:
    """An amount as it is written, that is at least so much."""
    if budget.in_bytes:
        unit, name = (2**20, "MiB") if takes >= 2**20 else (2**10, "KiB")
        return f"{math.ceil(takes / unit)}{name}"
    return str(math.ceil(takes))


def check_nothing_is_said_twice(study: LoadedStudy, budget: Budget) -> None:
    """Refuse a size that is set for all cells: it is what the budget picks.

    Raises:
        RecipeError: ``settings`` or the command line say ``density`` or ``entries``.
    """
    said: dict[str, str] = {}
    settings = study.study.settings.get("method")
    for name in ("density", "entries"):
        if isinstance(settings, dict) and name in settings:
            said[f"method.{name}"] = f"{study.source}: settings"
        if any(_overridden(cell, name) for cell in study.cells):
            said[f"method.{name}"] = COMMAND_LINE
    fix = "leave it out, or name it in a method's row, which then keeps it"
    what = f"is what {budget.text} picks"
    if said:
        raise RecipeError([Problem(key, what, file, None, fix) for key, file in said.items()])


def _overridden(cell: Cell, name: str) -> bool:
    place = cell.loaded.places.get(("method", name))
    return place is not None and place.file == COMMAND_LINE
