"""Compute what a study reports about its runs: rows, tests, checks, and the budget used."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from sparsegrad_cli.recipe.study_section import ComparisonTest
from sparsegrad_cli.records.run import RunRecord
from sparsegrad_cli.records.study import (
    BudgetBlock,
    BudgetRow,
    CellEntry,
    Check,
    PairTestsBlock,
    ResultRow,
    StudyRecord,
    Verdict,
)
from sparsegrad_cli.study.crossed_pairs import crossed_tests
from sparsegrad_cli.study.pairs import pair_tests
from sparsegrad_cli.study.rows import held_bytes, make_rows, train_step_peak

TOLERANCE = 0.05  # share of the request; a row that deviates by more, either way, is flagged
MEASURED = ("runs", "measured", "deviation", "verdict")  # keys of a budget row that come from runs


class Evidence(TypedDict):
    """The blocks of compare.json that depend only on its runs."""

    rows: list[ResultRow]
    tests: PairTestsBlock
    checks: list[Check]


def evidence(
    cells: Sequence[CellEntry], test: ComparisonTest | None = None, folder: Path | None = None
) -> Evidence:
    """Return ``rows``, ``tests`` and ``checks`` of compare.json.

    Args:
        cells: the runs.
        test: how pairs are tested; over seeds by default.
        folder: the study's folder, with the answers of its runs; needed for the test over seeds
            and examples.
    """
    test = test or ComparisonTest()
    if test.over == "seeds" or folder is None:
        tests = pair_tests(cells, test.row)
    else:
        tests = crossed_tests(cells, test, folder)
    return {"rows": make_rows(cells), "tests": tests, "checks": make_checks(cells)}


def up_to_date(record: StudyRecord, *, running: bool, folder: Path | None = None) -> StudyRecord:
    """Return a record with its evidence recomputed, since older versions recorded less.

    A test over seeds and examples stays as it is if the answers of some run are missing.

    Args:
        record: the content of compare.json.
        folder: the study's folder.
        running: whether a process has locked the study's folder. If not, a study that is recorded
            as running was killed.
    """
    if record.status == "running" and not running:
        record = record.changed(status="interrupted")
    if not record.cells:
        return record
    if record.budget is not None:
        record = record.changed(budget=with_measured(record.budget, record.cells))
    tests = record.tests or PairTestsBlock(test="", check="", correction="")
    margins = {label: value for label, value in tests.margins.items() if value}
    asked = ComparisonTest(over=tests.over, row=tests.row, margins=margins)
    found = evidence(record.cells, asked, folder)
    if found["tests"].reason and tests.pairs:
        found["tests"] = tests
    return record.changed(**found)


# --- whether the methods were compared under equal conditions


def make_checks(cells: Sequence[CellEntry]) -> list[Check]:
    """Return for each task and seed what all methods had in common, by the hashes of their runs.

    Each check is True, False, or None if fewer than two runs recorded it. The order is compared at
    the last step that all runs reached: the order of batches, or the order of their rows if some
    run divided its batches.
    """
    groups: dict[tuple[str, int], list[RunRecord]] = {}
    for cell in cells:
        group = groups.setdefault((cell.task, cell.seed), [])
        if cell.status == "done" and cell.run is not None:
            group.append(cell.run)
    return [_check(task, seed, runs) for (task, seed), runs in groups.items()]


def _check(task: str, seed: int, runs: Sequence[RunRecord]) -> Check:
    hashes = [run.hashes for run in runs]
    same_order, last = _order(runs)
    return Check(
        task=task,
        seed=seed,
        methods=len(runs),
        same_data=_same([each.data if each else None for each in hashes]),
        same_head_init=_same([each.head_init if each else None for each in hashes]),
        same_model=_same_model(runs),
        same_precision=_same([run.number_formats for run in runs]),
        same_order=same_order,
        steps_compared=last,
        same_code=_same([_code(run) for run in runs]),
    )


def _same_model(runs: Sequence[RunRecord]) -> bool | None:
    bodies = [run.hashes.body if run.hashes else None for run in runs]
    if None not in bodies:
        return _same(bodies)
    # Records of older versions: the fingerprint is that of the target modules.
    return _same([run.model.fingerprint if run.model else None for run in runs])


def _order(runs: Sequence[RunRecord]) -> tuple[bool | None, int]:
    """Return whether all runs had the same batches in the same order, and up to which step."""
    same, steps = _chain([run.hashes.order if run.hashes else {} for run in runs])
    if same is not False:
        return same, steps
    rows = _chain([run.hashes.rows if run.hashes else {} for run in runs])
    return (same, steps) if rows[0] is None else rows


def _chain(orders: Sequence[Mapping[int, str]]) -> tuple[bool | None, int]:
    common = set.intersection(*(set(order) for order in orders)) if orders else set()
    last = max(common, default=0)
    return (_same([order[last] for order in orders]), last) if last else (None, 0)


def _same(values: Sequence[str | None]) -> bool | None:
    """Return whether all values are equal; None if fewer than two, or not all, are recorded."""
    known = [value for value in values if value is not None]
    if len(set(known)) > 1:
        return False
    return True if len(known) > 1 and len(known) == len(values) else None


def _code(run: RunRecord) -> str | None:
    """Return commit, versions and machine, which may change between the runs of a study."""
    if run.environment is None:
        return None
    said = run.environment.model_dump(include={"python", "packages", "device", "device_name"})
    return json.dumps([said, run.git.commit if run.git else None], sort_keys=True, default=str)


# --- whether the runs stayed within the budget


def with_measured(budget: BudgetBlock, cells: Sequence[CellEntry]) -> BudgetBlock:
    """Return the ``budget`` block with the measurements of the finished runs.

    Every row gets ``runs`` (the number of runs with a measurement), ``measured`` (the maximum over
    seeds), ``deviation`` (of the seed furthest from the request, as a share of the request;
    positive if the run took more) and ``verdict``: ``met`` within the tolerance, ``over``,
    ``under``, or None if nothing was measured or the row is outside the budget.
    """
    rows = []
    for row in budget.rows:
        taken = [
            value
            for cell in cells
            if (cell.task, cell.method, cell.status) == (row.task, row.method, "done")
            and cell.run is not None
            and (value := measured(cell.run, budget.kind)) is not None
        ]
        rows.append(_against(row, taken, budget.request))
    return budget.changed(rows=rows)


def _against(row: BudgetRow, taken: Sequence[float], request: float | None) -> BudgetRow:
    if not taken or not request:
        return row.changed(runs=len(taken), measured=None, deviation=None, verdict=None)
    deviation = max((value / request - 1 for value in taken), key=abs)
    verdict: Verdict = "met"
    if abs(deviation) > TOLERANCE:
        verdict = "over" if deviation > 0 else "under"
    return row.changed(
        runs=len(taken),
        measured=max(taken),
        deviation=deviation,
        verdict=verdict if row.matched else None,
    )


def measured(run: RunRecord, kind: str | None) -> float | None:
    """Return the amount of a budget's kind that a run recorded for itself."""
    if kind == "trainable":
        return run.counts.trainable_targets if run.counts else None
    if kind == "optimizer_state":
        kept = run.sizes.optimizer_state_bytes if run.sizes else None
        return held_bytes(run, "optimizer_state") if kept is None else kept
    if kind == "peak":
        step = train_step_peak(run)
        calibration = run.calibration.peak_bytes if run.calibration else None
        return None if step is None else max(step.peak_bytes, calibration or 0)
    return None
