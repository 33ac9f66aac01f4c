"""Solve a study's budget, and write the size of every method into every run's recipe."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sparsegrad_cli.error_mapping import mapped_errors
from sparsegrad_cli.errors import FileFormatError, Problem, RecipeError, SparsegradError
from sparsegrad_cli.estimate.fake_run import Kernels, kernels_of_training
from sparsegrad_cli.memory.frozen_gc import frozen_gc
from sparsegrad_cli.progress import Observer
from sparsegrad_cli.recipe.budget import Budget
from sparsegrad_cli.recipe.load_recipe import LoadedRecipe, to_plain, with_settings
from sparsegrad_cli.recipe.study import Cell, LoadedStudy
from sparsegrad_cli.recipe.yaml_source import COMMAND_LINE
from sparsegrad_cli.records.study import BudgetBlock, BudgetRow, LargerSize
from sparsegrad_cli.report.units import format_amount
from sparsegrad_cli.study.budget.counting import Counting
from sparsegrad_cli.study.budget.solve import SETTABLE, Pick, UnreachableError, settings_of, solve
from sparsegrad_cli.study.evidence import MEASURED, TOLERANCE

# Recipes that differ only in these keys share one solution.
_NO_MATTER = ("seed", "output_dir")


@mapped_errors(
    again="run the same command again",
    memory=("match", "one method at a time: shapes alone take a few hundred MiB"),
)
def solve_study(
    study: LoadedStudy,
    *,
    kept: BudgetBlock | None = None,
    kernels: Kernels | None = None,
    observer: Observer | None = None,
) -> LoadedStudy:
    """Return the study with every matched method at the size that its budget allows.

    Args:
        study: the loaded study; without a budget it is returned unchanged.
        kept: the ``budget`` block of a comparison that is continued. Its sizes are kept for the
            same recipe under the same budget.
        kernels: the device whose memory is counted; by default the one that training would use.
        observer: notified of each method and task before it is solved.

    Raises:
        RecipeError: some methods do not fit the budget; the error lists them with the amounts that
            their smallest sizes take.
        SparsegradError: a recipe cannot be counted.
    """
    budget = study.study.budget
    if budget is None:
        return study
    started = time.perf_counter()
    cells = {(c.task, c.label): c for c in study.cells if c.seed == study.study.seeds[0]}
    check_size_is_open(study, budget)
    kernels = kernels or kernels_of_training(study.cells[0].loaded.recipe)
    solver = _Solver(study, budget, kernels, observer or Observer())
    before = kept if kept is not None and kept.match == budget.text else BudgetBlock()
    rows = solver.rows(list(cells.values()), kept)
    picked = {(row.task, row.method): row.set for row in rows}
    solved = tuple(
        replace(cell, loaded=_with_settings(cell.loaded, picked[cell.task, cell.label]))
        for cell in study.cells
    )
    block = BudgetBlock(
        match=budget.text,
        kind=budget.kind,
        request=int(budget.amount),
        tolerance=TOLERANCE,
        kernels=kernels if budget.in_bytes else None,
        # A continued comparison adds to the counts of its earlier part.
        rehearsals=(before.rehearsals or 0) + solver.counting.fake_runs,
        solved_s=(before.solved_s or 0.0)
        + (time.perf_counter() - started if solver.solved else 0.0),
        rows=rows,
    )
    return replace(study, cells=solved, budget=block)


def _with_settings(loaded: LoadedRecipe, settings: Mapping[str, Any]) -> LoadedRecipe:
    """Return the recipe with the settings that were picked.

    Raises:
        FileFormatError: compare.json holds settings that are not valid in a recipe.
    """
    try:
        return replace(loaded, recipe=with_settings(loaded.recipe, settings))
    except RecipeError as error:
        problem = error.problems[0]
        raise FileFormatError(
            f"its budget sets an invalid {problem.key}: {problem.what}",
            where="compare.json: budget",
            fix="restore the file from a copy, or name another --output-dir",
        ) from error


def _known(kept: BudgetBlock | None) -> dict[str, BudgetRow]:
    """Return the solved rows by key, without the measurements of their runs."""
    rows = kept.rows if kept is not None else []
    return {
        row.key: row.without(*MEASURED)
        for row in rows
        if row.key is not None and set(row.set) <= set(SETTABLE)
    }


class _Solver:
    """Solve the rows, each kind of recipe once.

    Attributes:
        counting: the fake runs that were needed.
        solved: number of rows that had not been solved before.
    """

    def __init__(
        self,
        study: LoadedStudy,
        budget: Budget,
        kernels: Kernels,
        observer: Observer,
    ) -> None:
        self._study, self._budget, self._observer = study, budget, observer
        self._entries = {entry.label: entry for entry in study.study.methods}
        self.counting = Counting(kernels)
        self.solved = 0
        self._asked = (budget.kind, budget.amount, kernels if budget.in_bytes else None)

    def rows(self, cells: list[Cell], kept: BudgetBlock | None) -> list[BudgetRow]:
        """Return the rows of the block, in the order of ``cells``."""
        known = _known(kept)
        wanted = {self._key(cell): cell for cell in reversed(cells) if self._matched(cell)}
        todo = [cell for key, cell in reversed(wanted.items()) if key not in known]
        answers = self._solved(todo)
        self.solved = len(answers)
        problems = [
            too_little(self._study, self._budget, cell, error)
            for cell, error in answers
            if isinstance(error, UnreachableError)
        ]
        if problems:
            raise RecipeError(problems)
        for cell, pick in answers:
            assert isinstance(pick, Pick)
            known[self._key(cell)] = self._row(cell, pick)
        return [
            known[self._key(cell)].changed(task=cell.task, method=cell.label, matched=True)
            if self._matched(cell)
            else BudgetRow(task=cell.task, method=cell.label, matched=False, set={})
            for cell in cells
        ]

    def _solved(self, cells: list[Cell]) -> list[tuple[Cell, Pick | UnreachableError]]:
        with frozen_gc():
            return [(cell, self._attempt(cell)) for cell in cells]

    def _attempt(self, cell: Cell) -> Pick | UnreachableError:
        self._observer.phase("solve", f"{self._budget.text}: {cell.task} {cell.label}")
        try:
            own = self._names_its_size(cell)
            return solve(cell.loaded, self._budget, self.counting, own_size=own)
        except UnreachableError as error:
            return error
        except SparsegradError as error:
            where = f"{cell.task} {cell.label}"
            error.where = f"{where}: {error.where}" if error.where else where
            raise

    def _matched(self, cell: Cell) -> bool:
        return self._entries[cell.label].matched

    def _names_its_size(self, cell: Cell) -> bool:
        """Return whether the study's row names the size, which the budget then keeps."""
        return bool(cell.loaded.recipe.method.size_keys & set(self._entries[cell.label].method))

    def _key(self, cell: Cell) -> str:
        """Return the sha256 (hex) over the budget and everything that its solution depends on."""
        plain = {k: v for k, v in to_plain(cell.loaded.recipe).items() if k not in _NO_MATTER}
        plain["train"] = {k: v for k, v in plain["train"].items() if k != "learning_rate"}
        asked = [*self._asked, self._names_its_size(cell), plain]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    def _row(self, cell: Cell, pick: Pick) -> BudgetRow:
        larger = pick.larger and LargerSize(size=pick.larger[0], takes=pick.larger[1])
        return BudgetRow(
            task=cell.task,
            method=cell.label,
            key=self._key(cell),
            set=settings_of(cell.loaded, pick.recipe),
            size=pick.size,
            predicted=pick.predicted,
            remainder=self._budget.amount - pick.predicted,
            limit=pick.limit,
            larger=larger,
            shape=pick.shape,
            shape_from=pick.shape_from,
            notes=pick.notes,
        )


def too_little(study: LoadedStudy, budget: Budget, cell: Cell, error: UnreachableError) -> Problem:
    """Return the problem that not even the smallest size fits, with an amount that is enough."""
    kind, place = budget.kind, study.match_place
    option = place.file == COMMAND_LINE
    ways = [f"allow {kind}={_enough(budget, error.takes)}", error.fix]
    if option:
        ways.append(f"leave {cell.label} out")
    else:
        ways.append("set matched: false in its row, which then runs without the budget")
    return Problem(
        "--match" if option else "match",
        f"{budget.text} is too little for {cell.label} on {cell.task}: at its smallest "
        f"({error.size}) it takes {format_amount(error.takes, kind)}",
        place.file,
        place.line,
        "; or ".join(way for way in ways if way),
    )


def _enough(budget: Budget, takes: float) -> str:
    """Return the amount, rounded up, in the form that ``match`` takes."""
    if budget.in_bytes:
        unit, name = (2**20, "MiB") if takes >= 2**20 else (2**10, "KiB")
        return f"{math.ceil(takes / unit)}{name}"
    return str(math.ceil(takes))


def check_size_is_open(study: LoadedStudy, budget: Budget) -> None:
    """Refuse a size that is set for all runs, because the budget chooses it.

    Raises:
        RecipeError: ``settings`` or the command line set ``density`` or ``entries``.
    """
    said: dict[str, str] = {}
    settings = study.study.settings.get("method")
    for name in ("density", "entries"):
        if isinstance(settings, dict) and name in settings:
            said[f"method.{name}"] = f"{study.source}: settings"
        if any(_overridden(cell, name) for cell in study.cells):
            said[f"method.{name}"] = COMMAND_LINE
    fix = "leave it out, or set it in a method's row, which then keeps it"
    what = f"cannot be set, because the budget {budget.text} chooses it"
    if said:
        raise RecipeError([Problem(key, what, file, None, fix) for key, file in said.items()])


def _overridden(cell: Cell, name: str) -> bool:
    place = cell.loaded.places.get(("method", name))
    return place is not None and place.file == COMMAND_LINE
