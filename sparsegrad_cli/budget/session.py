"""A study under a budget: every method's size is solved for, and every cell's recipe says it."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from sparsegrad_cli.budget.counting import Counting
from sparsegrad_cli.budget.solve import Pick, UnreachableError, settings_of, solve
from sparsegrad_cli.budget.timing import solve_seconds
from sparsegrad_cli.compare.spent import TOLERANCE
from sparsegrad_cli.errors import Problem, RecipeError, SparsegradError
from sparsegrad_cli.estimate.rehearsal import Kernels
from sparsegrad_cli.estimate.session import all_here_to_stay
from sparsegrad_cli.observer import Observer
from sparsegrad_cli.recipe.budget import Budget
from sparsegrad_cli.recipe.loading import LoadedRecipe, to_plain
from sparsegrad_cli.recipe.schema import Recipe
from sparsegrad_cli.recipe.source import COMMAND_LINE
from sparsegrad_cli.recipe.study import Cell, LoadedStudy
from sparsegrad_cli.report.access import mappings
from sparsegrad_cli.report.units import format_amount

_SIZES = ("rank", "density", "entries")
# Of two recipes that differ in nothing else, one answer serves both.
_NO_MATTER = ("seed", "output_dir")


def solve_study(
    study: LoadedStudy,
    *,
    kept: Mapping[str, Any] | None = None,
    jobs: int = 1,
    kernels: Kernels | None = None,
    observer: Observer | None = None,
) -> LoadedStudy:
    """The study with every matched method at the size that its budget allows.

    Args:
        study: as loaded; one without a budget is given back as it is.
        kept: the ``budget`` block of a comparison that goes on: what was picked there for the same
            recipe under the same budget stands.
        jobs: cells that will run at once.
        kernels: whose memory is counted; by default those that training here would use.
        observer: told of each method and task before it is solved.

    Raises:
        RecipeError: some method cannot be held to the budget; all that cannot, with what their
            smallest sizes take.
        SparsegradError: a recipe that cannot be counted or timed.
    """
    budget = study.study.budget
    if budget is None:
        return study
    started = time.perf_counter()
    cells = {(c.task, c.label): c for c in study.cells if c.seed == study.study.seeds[0]}
    _check_nothing_is_said_twice(study, budget)
    kernels = kernels or _kernels(study.cells[0].loaded.recipe)
    solver = _Solver(study, budget, jobs, kernels, observer or Observer())
    rows = solver.rows(list(cells.values()), kept)
    picked = {(row["task"], row["method"]): row["set"] for row in rows}
    solved = tuple(
        replace(cell, loaded=with_settings(cell.loaded, picked[cell.task, cell.label]))
        for cell in study.cells
    )
    block = {
        "match": budget.text,
        "kind": budget.kind,
        "request": int(budget.amount) if budget.kind != "seconds" else budget.amount,
        "tolerance": TOLERANCE,
        "kernels": kernels if budget.in_bytes else None,
        "rehearsals": solver.rehearsals,
        "solved_s": time.perf_counter() - started,
        "rows": rows,
    }
    return replace(study, cells=solved, budget=block)


def with_settings(loaded: LoadedRecipe, settings: Mapping[str, Any]) -> LoadedRecipe:
    """The recipe with some dotted keys set, checked again."""
    if not settings:
        return loaded
    plain = to_plain(loaded.recipe)
    for key, value in settings.items():
        section: Any = plain
        *path, name = key.split(".")
        for part in path:
            section = section[part]
        section[name] = value
    return replace(loaded, recipe=Recipe.model_validate_json(json.dumps(plain)))


class _Solver:
    """Solves rows, each kind of recipe once."""

    def __init__(
        self,
        study: LoadedStudy,
        budget: Budget,
        jobs: int,
        kernels: Kernels,
        observer: Observer,
    ) -> None:
        self._study, self._budget, self._jobs, self._observer = study, budget, jobs, observer
        self._entries = {entry.label: entry for entry in study.study.methods}
        self._counting = Counting(kernels)
        self._asked = (budget.kind, budget.amount, kernels if budget.in_bytes else None)

    @property
    def rehearsals(self) -> int:
        """How many it took."""
        return self._counting.rehearsals

    def rows(self, cells: list[Cell], kept: Mapping[str, Any] | None) -> list[dict[str, Any]]:
        """The rows of the block, in the order of the cells."""
        known: dict[str, dict[str, Any]] = {}
        for row in mappings(kept or {}, "rows"):
            if isinstance(row.get("key"), str) and isinstance(row.get("set"), dict):
                known[row["key"]] = dict(row)
        wanted = {self._key(cell): cell for cell in reversed(cells) if self._matched(cell)}
        todo = [cell for key, cell in reversed(wanted.items()) if key not in known]
        answers = self._solved(todo)
        problems = [self._problem(c, e) for c, e in answers if isinstance(e, UnreachableError)]
        if problems:
            raise RecipeError(problems)
        for cell, pick in answers:
            assert isinstance(pick, Pick)
            known[self._key(cell)] = self._plain(cell, pick)
        return [
            {
                **(known[self._key(cell)] if self._matched(cell) else {"set": {}}),
                "task": cell.task,
                "method": cell.label,
                "matched": self._matched(cell),
            }
            for cell in cells
        ]

    def _solved(self, cells: list[Cell]) -> list[tuple[Cell, Pick | UnreachableError]]:
        if self._budget.kind == "seconds":
            with ThreadPoolExecutor(self._jobs) as pool:
                return list(zip(cells, pool.map(self._attempt, cells), strict=True))
        with all_here_to_stay():
            return [(cell, self._attempt(cell)) for cell in cells]

    def _attempt(self, cell: Cell) -> Pick | UnreachableError:
        self._observer.phase("solve", f"{self._budget.text}: {cell.task} {cell.label}")
        try:
            if self._budget.kind == "seconds":
                return solve_seconds(cell.loaded, self._budget.amount, self._jobs)
            own = self._names_its_size(cell)
            return solve(cell.loaded, self._budget, self._counting, own_size=own)
        except UnreachableError as error:
            return error
        except SparsegradError as error:
            where = f"{cell.task} {cell.label}"
            error.where = f"{where}: {error.where}" if error.where else where
            raise

    def _matched(self, cell: Cell) -> bool:
        return self._entries[cell.label].matched

    def _names_its_size(self, cell: Cell) -> bool:
        """A core of a named rank has its entries still to be picked, unless it is dense."""
        said = set(self._entries[cell.label].method) & set(_SIZES)
        method = cell.loaded.recipe.method
        chooses = method.name != "lora" and getattr(method, "support", None) != "dense"
        return bool(said - {"rank"} if chooses else said)

    def _key(self, cell: Cell) -> str:
        """sha256 (hex) of the question: the budget, and what its answer depends on."""
        plain = {k: v for k, v in to_plain(cell.loaded.recipe).items() if k not in _NO_MATTER}
        plain["train"] = {k: v for k, v in plain["train"].items() if k != "learning_rate"}
        asked = [*self._asked, self._names_its_size(cell), plain]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    def _plain(self, cell: Cell, pick: Pick) -> dict[str, Any]:
        larger = pick.larger and {"size": pick.larger[0], "takes": pick.larger[1]}
        return {
            "key": self._key(cell),
            "set": settings_of(cell.loaded, pick.recipe),
            "size": pick.size,
            "predicted": pick.predicted,
            "remainder": self._budget.amount - pick.predicted,
            "limit": pick.limit,
            "larger": larger,
            "shape": pick.shape,
            "shape_from": pick.shape_from,
            "notes": pick.notes,
            "timed": pick.timed,
        }

    def _problem(self, cell: Cell, error: UnreachableError) -> Problem:
        kind, place = self._budget.kind, self._study.match_place
        option = place.file == COMMAND_LINE
        ways = [f"allow {kind}={_enough(self._budget, error.takes)}", error.fix]
        if option:
            ways.append(f"leave {cell.label} out")
        else:
            ways.append("`matched: false` in its row, which then runs outside of the budget")
        return Problem(
            "--match" if option else "match",
            f"{self._budget.text} is too little for {cell.label} on {cell.task}: at its smallest "
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


def _kernels(recipe: Recipe) -> Kernels:
    import torch

    return "cuda" if torch.cuda.is_available() and not recipe.train.use_cpu else "cpu"


def _check_nothing_is_said_twice(study: LoadedStudy, budget: Budget) -> None:
    """Raises RecipeError: a size set for all cells, which is what the budget picks."""
    if budget.kind == "seconds":
        return
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
