"""Measured amounts compared with the budget, and how the report states them."""

from __future__ import annotations

from typing import Any

import pytest
from support.record_samples import compare_record, study_of
from support.study_cells import cell, measured_in

from sparsegrad_cli.records.run import RunRecord
from sparsegrad_cli.records.study import StudyRecord
from sparsegrad_cli.report.budget import budget_checks, budget_flags, budget_table
from sparsegrad_cli.report.conclusions import check_lines, parity_table
from sparsegrad_cli.report.render import render
from sparsegrad_cli.report.study import study_document
from sparsegrad_cli.study.evidence import measured, up_to_date


def row(method: str, **changes: Any) -> dict[str, Any]:
    made = {"task": "t", "method": method, "matched": True, "set": {}, "size": "rank 3"}
    return {**made, "predicted": 9.0, "remainder": 1.0, "limit": "", "larger": None, **changes}


def run_of(cell: dict[str, Any]) -> RunRecord:
    return RunRecord.model_validate(cell["run"])


def budget(kind: str, request: float, *rows: dict[str, Any]) -> dict[str, Any]:
    about = {"match": f"{kind}={request}", "kind": kind, "request": request, "tolerance": 0.05}
    return {**about, "rows": list(rows)}


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("trainable", 10),
        ("optimizer_state", 8),  # the maximum over a step's phases if the end was not recorded
        ("peak", 150),
    ],
)
def test_measured_reads_the_amount_that_a_run_recorded(kind: str, value: float) -> None:
    assert measured(run_of(cell("lora", 0, 0.5)), kind) == value


def test_a_peak_includes_calibration() -> None:
    made = cell("core", 0, 0.5, calibration={"peak_bytes": 700, "seconds": 12.0})
    assert measured(run_of(made), "peak") == 700
    made["run"]["calibration"]["peak_bytes"] = 3
    assert measured(run_of(made), "peak") == 150
    made["run"]["sizes"]["optimizer_state_bytes"] = 6
    assert measured(run_of(made), "optimizer_state") == 6
    assert measured(RunRecord(status="running"), "peak") is None


@pytest.mark.parametrize(
    ("request_", "verdict"),
    [(150, "met"), (157, "met"), (158, "under"), (143, "met"), (142, "over"), (1, "over")],
)
def test_a_deviation_within_five_percent_is_met(request_: float, verdict: str) -> None:
    (found,) = measured_in(budget("peak", request_, row("lora")), [cell("lora", 0, 0.5)])["rows"]
    assert (found["verdict"], found["measured"], found["runs"]) == (verdict, 150, 1)
    assert found["deviation"] == pytest.approx(150 / request_ - 1)


def test_the_seed_with_the_largest_deviation_decides() -> None:
    cells = [cell("lora", seed, 0.5) for seed in range(3)]
    for each, peak in zip(cells, (200, 202, 184), strict=True):
        each["run"]["memory"]["phases"]["backward"]["peak_bytes"] = peak
    (found,) = measured_in(budget("peak", 200.0, row("lora")), cells)["rows"]
    assert found["measured"] == 202 and found["runs"] == 3
    assert found["deviation"] == pytest.approx(-0.08) and found["verdict"] == "under"


def test_unfinished_and_exempt_rows_have_no_verdict() -> None:
    asked = budget("peak", 10, row("lora"), row("full", matched=False), row("core"))
    cells = [
        cell("lora", 0, 0.5, status="failed"),
        cell("full", 0, 0.5),
        cell("core", 0, 0.5, run=None),
    ]
    lora, full, core = measured_in(asked, cells)["rows"]
    assert lora["verdict"] is None and lora["measured"] is None and lora["runs"] == 0
    assert core["verdict"] is None
    assert full["measured"] == 150 and full["verdict"] is None


def test_report_states_deviations_from_the_budget() -> None:
    asked = budget(
        "peak",
        1500,
        row("lora", larger={"size": "rank 4", "takes": 1600}),
        row("full", limit="every entry of the targets trains"),
        row("core"),
        row("free", matched=False),
        row("late"),
    )
    taken = {"lora": 1300, "full": 900, "core": 1600, "free": 2000}
    cells = []
    for method, peak in taken.items():
        made = cell(method, 0, 0.5)
        made["run"]["memory"]["phases"]["backward"]["peak_bytes"] = peak
        cells.append(made)
    study = study_of({"budget": measured_in(asked, cells), "cells": cells})
    said = budget_flags(study.budget)
    assert said[0] == "t: lora took 1.3 KiB, 13.3 % less than peak=1500: rank 4 would take 1.6 KiB."
    assert "full took 900 B" in said[1] and said[1].endswith(": every entry of the targets trains.")
    assert "the study exempts it from peak=1500" in said[2] and len(said) == 3
    ((held, line),) = budget_checks(study.budget)
    assert held is False and line == "t: core took 1.6 KiB, 6.67 % MORE than peak=1500."
    assert (False, line) in check_lines(study)
    table = budget_table(study.budget)
    assert table is not None and table.notes[:3] == said
    assert [cells[-1] for cells in table.rows] == [
        "under, \N{MINUS SIGN}13.3 %",
        "under, \N{MINUS SIGN}40 %",
        "over, +6.67 %",
        "not applied",
        "",
    ]
    markdown = render(study_document(study), "md")
    assert "MORE" in markdown and "would take" in markdown


def test_parity_lists_the_keys_that_the_budget_set() -> None:
    values = {"full": 8, "lora": 32}
    declared = [
        {"task": "t", "key": "train.per_device_train_batch_size", "values": values, "why": "budget"}
    ]
    record = {"tasks": ["t"], "parity": {"compared": 49, "declared": declared, "flagged": []}}
    table = parity_table(study_of(record))
    assert table is not None and table.rows[0][2] == "set for the budget"
    (said,) = [line for held, line in check_lines(study_of(record)) if held]
    assert "micro-batches set for the budget" in said and "learning rates" not in said


def test_report_without_a_budget_mentions_none() -> None:
    assert budget_table(None) is None and not budget_checks(None) and not budget_flags(None)
    study = study_of(compare_record() | {"budget": None})
    assert "Budget" not in render(study_document(study), "md")


def test_up_to_date_recomputes_the_budget() -> None:
    record = compare_record()
    for made in record["cells"]:
        if made["run"]:
            made["run"]["counts"]["trainable_targets"] = 90_000
    newer = up_to_date(StudyRecord.model_validate(record), running=False).to_json()
    (found,) = newer["budget"]["rows"]
    assert (found["measured"], found["verdict"]) == (90_000, "over")
