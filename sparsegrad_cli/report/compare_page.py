"""The page of a comparison."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsegrad_cli.records.store import write_text_atomic
from sparsegrad_cli.report import compare_charts, memory_charts, sparsity_charts
from sparsegrad_cli.report.access import items, mappings, text
from sparsegrad_cli.report.answers_page import answers_section
from sparsegrad_cli.report.answers_record import SideBySide
from sparsegrad_cli.report.budget_tables import budget_table
from sparsegrad_cli.report.cell_tables import cells_table, failures_table
from sparsegrad_cli.report.compare_record import figures_in, rows_of, tasks_of
from sparsegrad_cli.report.compare_tables import overview_table, score_table
from sparsegrad_cli.report.cost_tables import calibration_costs, counters_table
from sparsegrad_cli.report.labels import status_of
from sparsegrad_cli.report.page import (
    checked,
    drawing,
    folded,
    html_table,
    page,
    paragraph,
    verdict,
)
from sparsegrad_cli.report.parity_tables import check_lines, parity_table
from sparsegrad_cli.report.record_tables import provenance
from sparsegrad_cli.report.reference_results import figures_table
from sparsegrad_cli.report.tuning_tables import trials_table, tuning_progress, tuning_table
from sparsegrad_cli.report.verdicts import pairs_table, verdict_lines

Chart = Callable[[Any, str], str | None]

_SCALE = "Scores are times 100."
_SCORES = (
    "One dot a seed; the bar is the mean with its standard deviation. Diamonds, where there are "
    "any, are published figures. Differences smaller than the spread are not differences."
)
_CURVES = "Mean over seeds, single seeds behind. Flat at the end: training longer would not help."
_BUDGET = (
    "The best mean score that fits a memory budget, by method: a curve begins where the first of "
    "its rows fits, and steps up where a better one does. The budget has to hold calibration, too. "
    "Dashed: single seeds, which rank nothing."
)
_TRADE = (
    "Further left is better, and up (down for losses and perplexities): more for fewer bytes "
    "beyond the weights themselves. Bars are 95 % intervals of the mean over seeds; those of few "
    "seeds are wide, and leave the figure. One seed has none."
)
_STEP_MEMORY = "The training step's peak by category, on the longest examples of the task."
_PHASES = (
    "The peak of every phase by category, calibration included: what is held at the moment when a "
    "phase needs most. First seed."
)
_SPEED = (
    "Optimizer steps a second, all of a step included; the bar is the range over seeds. Only "
    "comparable when nothing else ran on the machine and cells did not run side by side."
)
_MAPS = (
    "Where the entries lie that were touched in any step, in the middle target: the share of each "
    "block of the matrix that the method chooses from, a core sorted by singular value or the "
    "weight itself. Methods that leave no entry out have no map. First seed."
)
_TARGETS = (
    "Entries ever touched, as a share of each target's weights; of LoRA, entries of A and B. "
    "Logarithmic colours. First seed."
)
_FAIR = (
    "Recipes are compared before the first run: methods may differ in themselves, their "
    "calibration and their learning rate, and in nothing else that the study does not allow. "
    "While training, what every run really met is hashed: the model, the head at the start, the "
    "data, the batches in their order, and the precision."
)
_TESTS = (
    "Differences are tested between every two methods over all seeds and tasks, and corrected for "
    "the number of pairs. Runs are paired: same task, same seed."
)
_TUNING = (
    "Before the cells ran, every method had as many trials as any other, over a space as wide "
    "about a centre of its own, on seeds that are not reported. The cells run with the best "
    "settings of their method and task."
)
_CHARTS: tuple[tuple[Chart, str], ...] = (
    (compare_charts.score_dots, _SCORES),
    (compare_charts.learning_curves, _CURVES),
    (memory_charts.score_under_budget, _BUDGET),
    (memory_charts.score_against_memory, _TRADE),
    (memory_charts.memory_by_method, _STEP_MEMORY),
    (memory_charts.memory_by_phase, _PHASES),
    (compare_charts.speed_bars, _SPEED),
    (sparsity_charts.sparsity_maps, _MAPS),
    (sparsity_charts.touched_by_target, _TARGETS),
)


class Drawings:
    """Charts that were drawn before: of a task in which nothing has finished since, they stand.

    A chart goes by the task's rows, finished cells and published figures, and by which methods
    there are, whose place gives the colour; so equal ones give equal charts. One page's are kept.
    """

    def __init__(self) -> None:
        self._kept: dict[str, str | None] = {}
        self._used: dict[str, str | None] = {}

    def draw(self, chart: Chart, compare: Mapping[str, Any], task: str, key: str) -> str | None:
        """The chart of a task; ``key`` is :func:`task_key`'s."""
        name = f"{chart.__module__}.{chart.__name__} {key}"
        if name not in self._kept:
            self._kept[name] = chart(compare, task)
        self._used[name] = self._kept[name]
        return self._used[name]

    def page_done(self) -> None:
        """Forget what the last page did not use."""
        self._kept, self._used = self._used, {}


def task_key(compare: Mapping[str, Any], task: str) -> str:
    """sha256 (hex) of all that the charts of a task go by."""
    cells = [
        cell
        for cell in mappings(compare, "cells")
        if text(cell, "task") == task and status_of(cell) == "done"
    ]
    about = [task, rows_of(compare, task), cells, items(compare, "methods"), figures_in(compare)]
    return hashlib.sha256(json.dumps(about, default=str).encode()).hexdigest()


def write_compare_html(
    compare: Mapping[str, Any],
    path: Path,
    answers: Sequence[SideBySide] = (),
    drawings: Drawings | None = None,
) -> None:
    """Write the page of a comparison; of one that is running, a page that looks again.

    Args:
        compare: ``compare.json`` as loaded; anything may be missing.
        path: the file to write.
        answers: what its models answered to the same questions.
        drawings: what was drawn for the page before.

    Raises:
        DiskError: the file could not be written.
    """
    drawings = drawings or Drawings()
    overview = overview_table(compare)
    lead = paragraph(_progress(compare), dim=True) + verdict(verdict_lines(compare))
    lead += html_table(overview) if overview else ""
    pairs = pairs_table(compare)
    sections = [("Differences", paragraph(_TESTS) + html_table(pairs) if pairs else "")]
    sections.append(("Budget", html_table(budget_table(compare))))
    sections += [(task, _task(compare, task, drawings)) for task in tasks_of(compare)]
    sections += [answers_section(each, alone=len(answers) == 1) for each in answers]
    tuned, trials = tuning_table(compare), trials_table(compare)
    tuning = paragraph(_TUNING) + html_table(tuned) if tuned else ""
    if trials:
        tuning += folded("Every trial", html_table(trials))
    fair = paragraph(_FAIR) + checked(check_lines(compare))
    parity = parity_table(compare)
    sections += [
        ("Tuning", tuning),
        ("Published figures", html_table(figures_table(compare))),
        ("Cells that are not done", html_table(failures_table(compare))),
        ("Was it fair?", fair + (html_table(parity) if parity else "")),
        ("All cells", folded("Every cell", html_table(cells_table(compare)))),
        ("Provenance", html_table(provenance(compare))),
    ]
    write_text_atomic(path, page(compare, sections, lead, alive=is_alive(compare)))
    drawings.page_done()


def is_alive(compare: Mapping[str, Any]) -> bool:
    """Whether it is still running, as far as the record knows."""
    return status_of(compare) == "running"


def _progress(compare: Mapping[str, Any]) -> str:
    """``12 of 24 cells done; running: glue/rte lora seed 42. Scores are times 100.``"""
    cells = mappings(compare, "cells")
    done = sum(status_of(cell) == "done" for cell in cells)
    running = [
        " ".join(
            filter(None, (text(cell, "task"), text(cell, "method"), "seed", text(cell, "seed")))
        )
        for cell in cells
        if status_of(cell) == "running"
    ]
    now = f"; running: {', '.join(running)}" if running else ""
    trials = tuning_progress(compare)
    first = f"{trials}, " if trials else ""
    return f"{first}{done} of {len(cells)} cells done{now}. {_SCALE}"


def _task(compare: Mapping[str, Any], task: str, drawings: Drawings) -> str:
    tables = html_table(score_table(compare, task), "No rows recorded.")
    tables += html_table(counters_table(compare, task))
    tables += html_table(calibration_costs(compare, task))
    key = task_key(compare, task)
    return tables + "".join(
        drawing(drawings.draw(chart, compare, task, key), caption) for chart, caption in _CHARTS
    )
