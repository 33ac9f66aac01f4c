"""Tests of pairs of methods over tasks and seeds, and how the report states them."""

from __future__ import annotations

import math
from typing import Any

import pytest
from support.record_samples import study_of
from support.study_cells import cell, evidence_of, pair_tests_of, study_cells

from sparsegrad_cli.records.study import StudyRecord
from sparsegrad_cli.report.conclusions import pairs_table, verdict_lines
from sparsegrad_cli.report.scores import best_rows, score_table
from sparsegrad_cli.study.evidence import up_to_date
from sparsegrad_cli.study.statistics import sign_flip_p, student


def only(tests: dict[str, Any]) -> dict[str, Any]:
    pairs: list[dict[str, Any]] = tests["pairs"]
    (pair,) = pairs
    return pair


def test_pair_tests_equal_a_worked_example() -> None:
    scores = {"t": {"a": [0.6, 0.7, 0.5], "b": [0.5, 0.75, 0.3]}}
    pair = only(pair_tests_of(study_cells(scores)))
    differences = [0.1, -0.05, 0.2]
    size = math.sqrt((0.01 + 0.0025 + 0.04) / 3)
    assert (pair["n"], pair["tasks"], pair["seeds"]) == (3, 1, 3)
    assert (pair["wins"], pair["losses"]) == (2, 1)
    assert math.isclose(pair["mean"], 0.25 / 3)
    # Of +-0.1 +-0.05 +-0.2 these come to 0.25 or further: all of one sign, and all but 0.05.
    assert pair["p"] == sign_flip_p([d / size for d in differences]) == 4 / 8
    found = student([differences])
    assert found is not None and pair["interval"] == pytest.approx([found.low, found.high])
    assert pair["better"] is None and pair["smallest_p"] == 0.25


def test_pair_test_does_not_depend_on_the_scale_of_a_task() -> None:
    steady = {"a": [0.61, 0.64, 0.66, 0.69], "b": [0.60, 0.62, 0.65, 0.67]}
    wild = {"a": [0.1, 0.9, 0.2, 0.6], "b": [0.7, 0.1, 0.6, 0.2]}
    tiny = {m: [v / 1000 for v in values] for m, values in steady.items()}
    plain = only(pair_tests_of(study_cells({"x": steady, "y": wild})))
    scaled = only(pair_tests_of(study_cells({"x": tiny, "y": wild})))
    assert plain["p"] == scaled["p"] and plain["mean"] != scaled["mean"]


def test_a_lower_loss_is_better() -> None:
    values = {"a": [1.0 - 0.01 * s for s in range(8)], "b": [1.1 - 0.011 * s for s in range(8)]}
    pair = only(pair_tests_of(study_cells({"t": values}, {"t": "loss"})))
    assert pair["better"] == "a" and (pair["wins"], pair["losses"]) == (8, 0)
    assert pair["mean"] < 0 and pair["metric"] == "loss"
    higher = only(pair_tests_of(study_cells({"t": values})))
    assert higher["better"] == "b" and higher["p"] == pair["p"] == 2.0**-7


def test_different_metrics_are_tested_but_not_averaged() -> None:
    good = {"a": [0.7, 0.71, 0.73, 0.72], "b": [0.6, 0.62, 0.61, 0.6]}
    less = {m: [2 - v for v in values] for m, values in good.items()}
    cells = study_cells({"x": good, "y": less}, {"y": "loss"})
    pair = only(pair_tests_of(cells))
    assert pair["better"] == "a" and pair["p"] == 2.0**-7
    assert pair["mean"] is None and pair["interval"] is None and pair["p_t"] is None
    compare = {"tests": pair_tests_of(cells), "seeds": [0, 1, 2, 3]}
    (line,) = verdict_lines(study_of(compare))
    assert line == "a is better than b (8 paired runs on 2 tasks; Holm's p 0.008)."


def test_only_common_finished_seeds_count() -> None:
    cells = study_cells({"t": {"a": [0.5, 0.6, 0.7], "b": [0.4, 0.5, 0.6]}, "u": {"a": [0.5]}})
    cells += [cell("b", 9, 0.9, task="u"), cell("b", 0, 0.4, task="u")]
    cells[2] |= {"status": "failed"}
    pair = only(pair_tests_of(cells))
    assert (pair["n"], pair["tasks"]) == (2, 1)  # they share one seed of u
    assert pair["wins"] == 2


def test_one_seed_gives_no_ranking() -> None:
    scores = {task: {m: [0.5 + 0.1 * at] for at, m in enumerate("abc")} for task in "xyzuvwpq"}
    compare = {**evidence_of(study_cells(scores)), "seeds": [0], "tasks": list(scores)}
    assert compare["tests"]["pairs"] == [] and compare["tests"]["untested"] == 3
    assert verdict_lines(study_of(compare)) == [
        "n = 1: with one seed, no method is ranked and no difference is tested."
    ]
    assert pairs_table(study_of(compare)) is None
    for task in scores:
        table = score_table(study_of(compare), task)
        assert table is not None and not table.strong and "95 % interval" not in table.header
        assert any("with one seed" in note for note in table.notes)


def test_a_row_with_one_seed_removes_the_ranking() -> None:
    study = study_of(evidence_of(study_cells({"t": {"a": [0.5, 0.6], "b": [0.7, 0.8]}})))
    assert [row.method for row in best_rows(study.rows)] == ["b"]
    study = study_of(evidence_of(study_cells({"t": {"a": [0.5, 0.6], "b": [0.7]}})))
    assert best_rows(study.rows) == []


def test_report_states_whether_methods_differ() -> None:
    seeds = range(9)
    scores = {
        "a": [0.80 + 0.001 * s for s in seeds],
        "b": [0.70 + 0.0012 * s for s in seeds],
        "c": [0.70 + 0.0012 * s + (0.002 if s % 2 else -0.002) for s in seeds],
    }
    compare = evidence_of(study_cells({"t": scores}))
    lines = verdict_lines(study_of(compare))
    assert lines[0].startswith("a is better than b by 9.9 (95 % interval 9.9 to 10.0; 9 paired")
    assert lines[1].startswith("a is better than c by ")
    assert lines[2].startswith("No difference shown in the other pair of methods, which does not")
    assert len(lines) == 3
    table = pairs_table(study_of(compare))
    assert table is not None
    shown = [row[-2:] for row in table.rows]
    assert shown[:2] == [("a better", "–")] * 2 and shown[2][0] == "no difference shown"
    assert int(shown[2][1]) > 9  # seeds needed


def test_report_states_a_mean_that_contradicts_the_test() -> None:
    """a is 0.3 points ahead on seven tasks and 5 behind on the eighth, three seeds of each."""
    ahead = {"a": [0.803, 0.8131, 0.8229], "b": [0.80, 0.81, 0.82]}
    behind = {"a": [0.45, 0.46, 0.47], "b": [0.50, 0.5101, 0.5199]}
    scores = {f"t{n}": ahead for n in range(7)} | {"cola": behind}
    compare = evidence_of(study_cells(scores))
    pair = only(compare["tests"])
    assert pair["better"] == "a" and pair["mean"] < 0
    (line,) = verdict_lines(study_of(compare))
    assert line.startswith("a is better than b when each task is weighted by its own spread (24")
    assert line.endswith("although the plain mean over tasks puts b ahead by 0.4.")
    losses = {"t": {"a": [1.0 - 0.01 * s for s in range(8)], "b": [1.1] * 8}}
    lines = verdict_lines(study_of(evidence_of(study_cells(losses, {"t": "loss"}))))
    assert lines[0].startswith("a is better than b by 0.135 (95 % interval 0.1")


def test_seeds_needed_are_recorded_for_differences_that_are_not_shown() -> None:
    found = only(pair_tests_of(study_cells({"t": {"a": [0.6, 0.62], "b": [0.5, 0.53]}})))
    assert found["better"] is None and found["seeds_needed"] == 6  # 2^(1 - 5) is above 0.05
    equal = only(pair_tests_of(study_cells({"t": {"a": [0.6, 0.5], "b": [0.5, 0.6]}})))
    assert equal["seeds_needed"] is None and equal["p"] == 1.0  # the mean difference is zero
    clear = {"t": {"a": [0.6 + s / 100 for s in range(8)], "b": [0.5] * 8}}
    shown = only(pair_tests_of(study_cells(clear)))
    assert shown["better"] == "a" and shown["seeds_needed"] is None


def test_up_to_date_recomputes_evidence_and_marks_a_killed_study_interrupted() -> None:
    cells = study_cells({"t": {"a": [0.5, 0.6], "b": [0.7, 0.8]}})
    older = StudyRecord.model_validate({"status": "running", "cells": cells})
    found = up_to_date(older, running=True).to_json()
    assert found["status"] == "running"
    assert {key: found[key] for key in ("rows", "tests", "checks")} == evidence_of(cells)
    assert up_to_date(older, running=False).status == "interrupted"
