"""The sentence at the top of every report."""

from __future__ import annotations

from typing import Any

import pytest
from support.record_samples import compare_record, run_of, run_record, study_of
from support.study_cells import evidence_of, study_cells

from sparsegrad_cli.records.evaluation import EvaluationRecord
from sparsegrad_cli.records.export import ExportRecord
from sparsegrad_cli.records.metric_direction import Scale
from sparsegrad_cli.records.run import Evaluation, MetricsBlock, RunRecord, TaskBlock
from sparsegrad_cli.report.headline import (
    calibration_headline,
    evaluation_headline,
    export_headline,
    misses_baseline,
    run_headline,
    study_headline,
)
from sparsegrad_cli.report.next_steps import run_next
from sparsegrad_cli.report.run import scale_of_run


def headline_of(scores: dict[str, dict[str, list[float]]], **metrics: str) -> str:
    cells = study_cells(scores, metrics or dict.fromkeys(scores, "accuracy"))
    return study_headline(study_of({"cells": cells, **evidence_of(cells)}))


@pytest.mark.parametrize(
    ("by_method", "words"),
    [
        (
            {"sparsegrad": [0.74, 0.76], "lora": [0.656, 0.66]},
            "sparsegrad 75.0, lora 65.8; 2 seeds: inconclusive, 6 would decide",
        ),
        (
            {"lora": [0.7, 0.6], "full": [0.6, 0.7]},
            "lora 65.0, full 65.0; 2 seeds: inconclusive, and no number of seeds would decide: the "
            "mean difference is zero",
        ),
        (
            {"a": [0.7], "b": [0.6], "c": [0.5]},
            "a 70.0, b 60.0, c 50.0; 1 seed: not tested, 7 are the fewest that could decide",
        ),
        ({"a": [0.7, 0.71]}, "a 70.5; 2 seeds: no second method to compare with"),
    ],
)
def test_a_study_says_its_scores_and_how_certain_they_are(
    by_method: dict[str, list[float]], words: str
) -> None:
    assert headline_of({"t": by_method}) == words


def test_of_many_methods_the_best_seven_are_named() -> None:
    words = headline_of({"t": {f"m{n}": [0.9 - n / 100] for n in range(25)}})
    assert words.startswith("m0 90.0, m1 89.0, m2 88.0, m3 87.0, m4 86.0, m5 85.0, m6 84.0 and 18 ")
    assert "and 18 more; 1 seed: not tested" in words


def test_a_shown_difference_is_named_beside_one_that_is_not() -> None:
    scores = {
        "a": [0.80 + s / 500 for s in range(9)],
        "b": [0.80 + (s * 7 % 5) / 250 for s in range(9)],
        "c": [0.60 + s / 900 for s in range(9)],
    }
    words = headline_of({"t": scores})
    assert words.startswith("a 80.8, b 80.8, c 60.4; 9 seeds: a is better than c, b is better than")
    assert "inconclusive between a and b" in words


def test_lower_is_better_for_losses() -> None:
    words = headline_of({"t": {"a": [1.2, 1.3], "b": [1.0, 1.1]}}, t="loss")
    assert words.startswith("b 1.050, a 1.250 (validation loss, lower is better); 2 seeds: incon")


def test_tasks_are_averaged_only_if_their_scores_are_of_one_kind() -> None:
    scores = {"s": {"a": [0.6, 0.7], "b": [0.5, 0.6]}, "t": {"a": [0.8, 0.7], "b": [0.7, 0.6]}}
    assert headline_of(scores).startswith("Mean of 2 tasks: a 70.0, b 60.0; 2 seeds: inconclusive,")
    mixed = headline_of(scores, s="accuracy", t="loss")
    assert mixed.startswith("s: a 65.0, b 55.0; t: b 0.650, a 0.750 (validation loss, lower is")


def test_unfinished_and_failed_runs_are_counted() -> None:
    record = compare_record()
    assert study_headline(study_of(record)).endswith("1 run out of memory")
    assert "no number of seeds" not in study_headline(study_of(record))  # an earlier version's
    record["cells"][0] |= {"status": "pending", "run": None}
    assert study_headline(study_of(record)).startswith("So far: ")
    empty = study_of({"cells": [], "status": "running"})
    assert study_headline(empty) == "No scores yet; 0 of 0 runs done"


def run_words(record: dict[str, Any]) -> str:
    run = run_of(record)
    return run_headline(run, scale_of_run(run))


def test_a_run_says_its_score_and_what_it_compares_with() -> None:
    assert run_words(run_record()) == (
        "sparsegrad 61.0, before training 0.0, majority class 0.0; Matthews correlation ×100 at "
        "step 300 of 375"
    )
    poor = run_record()
    poor["metrics"]["best"]["score"] = 0.0
    assert "no better than the same answer for every row" in run_words(poor)


def test_a_run_that_was_killed_still_shows_its_best_score() -> None:
    killed = run_record() | {"status": "interrupted"}
    killed["metrics"] |= {"best": None, "final": None}
    killed["metrics"]["history"][1]["score"] = 0.7  # step 200
    words = run_words(killed)
    assert words.startswith("Interrupted after step 300; best so far: sparsegrad 70.0, ")
    assert "at step 200" in words
    assert run_words({"status": "failed"}) == "Failed: no evaluation yet"


@pytest.mark.parametrize(
    ("support", "full", "original", "words"),
    [
        (0.6, 0.8, 0.5, "The basis holds: in the basis 80.0 %"),
        (0.4, 0.8, 0.5, "The basis holds, but the support that trains does not: in the basis"),
        (0.4, 0.45, 0.5, "The basis does not hold: in the basis 45.0 %"),
    ],
)
def test_a_calibration_compares_held_out_energy_with_no_basis(
    support: float, full: float, original: float, words: str
) -> None:
    record = run_record() | {"command": "calibrate"}
    shares = {"count": 5, "support": support, "full_basis": full, "original": original}
    record["calibration"]["energy"]["compared"] = {"mean_by_kind": {"k": shares}}
    found = calibration_headline(run_of(record))
    assert found.startswith(words) and f"without a basis {100 * original:.1f} %" in found


def test_an_evaluation_cuts_its_interval_at_the_end_of_the_range() -> None:
    record = EvaluationRecord.model_validate(
        {"model": "m", "about": "a", "file": "f.csv", "rows": 40, "cut": 0, "resamples": 1000}
        | {"metrics": {"accuracy": {"value": 0.99, "interval": [0.95, 1.02]}}}
        | {"classes": [{"name": n, "rows": 20, "predicted": 20, "recall": r} for n, r in RECALLS]}
    )
    words = "accuracy ×100 99.0 (95 % interval 95.0 to 100.0) on 40 rows"
    assert evaluation_headline(record) == f"{words}; weakest class: b, 80.0 % found"
    whole = [each.changed(recall=1.0) for each in record.classes]
    assert evaluation_headline(record.changed(classes=whole)) == words


RECALLS = (("a", 1.0), ("b", 0.8))


@pytest.mark.parametrize(
    ("difference", "words"), [(1e-6, "agrees with the run"), (1.0, "differs from the run")]
)
def test_an_export_says_whether_it_agrees_with_the_run(difference: float, words: str) -> None:
    judged = {"against": "the run", "difference": difference, "tolerance": 1e-4}
    check = {"examples": 8, "answers": 8, "same_answers": 8, "difference": difference}
    record = ExportRecord.model_validate(
        {"to": "merged", "model": {"name": "m"}, "check": check | {"judged": judged}}
    )
    assert export_headline(record).endswith(f"8 validation rows compared: the export {words}")


@pytest.mark.parametrize(("score", "misses"), [(0.4, False), (0.5, True), (0.6, True)])
def test_lower_score_than_the_baseline_is_better_for_an_error(score: float, misses: bool) -> None:
    best = MetricsBlock(best=Evaluation(step=1, score=score))
    run = RunRecord(status="done", task=TaskBlock(majority_score=0.5), metrics=best, name="r")
    error = Scale("error", times=1, lower_is_better=True)
    assert misses_baseline(run, error) is misses
    advice = "no better than that of the same answer"
    assert (advice in str(run_next(run, error))) is misses
