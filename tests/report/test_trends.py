"""Captions that follow the data: the rule for the end of a curve, and the sentences made by it."""

from __future__ import annotations

from typing import Any

import pytest
from support.record_samples import compare_record, run_of, run_record, study_of

from sparsegrad_cli.report.captions import curves_caption, learning_caption, loss_caption
from sparsegrad_cli.report.run import scale_of_run
from sparsegrad_cli.report.trends import Trend, trend_of


def curve(*values: float) -> list[tuple[int, float]]:
    return list(enumerate(values))


@pytest.mark.parametrize(
    ("values", "direction"),
    [
        ((0, 20, 40, 60), "improves"),  # 60 after 40: a third of the range
        ((0, 50, 60, 61, 61.2), "flat"),
        ((0, 60, 70, 50), "worse"),
        ((50, 50, 50), "flat"),
        ((0, 10, 20, 30, 40, 50, 60, 70, 80), "improves"),
        ((0, 90, 89, 91, 90, 89, 90, 91, 90), "flat"),  # noise far below a tenth of the range
        ((0, 90, 100), "flat"),  # exactly a tenth
        ((0, 89, 100), "improves"),
    ],
)
def test_the_last_third_is_compared_with_the_third_before(
    values: tuple[float, ...], direction: str
) -> None:
    trend = trend_of(curve(*values))
    assert trend is not None and trend.direction == direction
    mirrored = trend_of(curve(*(-value for value in values)), lower_is_better=True)
    assert mirrored is not None and mirrored.direction == direction


def test_a_trend_has_both_means_and_needs_three_points() -> None:
    assert trend_of(curve(1, 2)) is None
    assert trend_of(curve(0, 1, 2, 4, 6, 8)) == Trend("improves", 2, 7.0, 3.0)


def with_scores(*scores: float) -> dict[str, Any]:
    record = run_record()
    record["metrics"]["initial"] = None
    record["metrics"]["history"] = [
        {"step": 10 * at, "epoch": 1.0, "score": score, "loss": 1 - score, "values": {}}
        for at, score in enumerate(scores)
    ]
    return record


@pytest.mark.parametrize(
    ("scores", "words", "never"),
    [
        ((0.0, 0.2, 0.4, 0.6), "Still improving at the end: 60.0 after 40.0.", "Flat"),
        ((0.0, 0.5, 0.6, 0.61, 0.611), "Flat at the end: 61.1 after 61.0.", "improving"),
        ((0.0, 0.6, 0.7, 0.5), "Worse at the end than before: 50.0 after 70.0.", "Flat"),
        ((0.1, 0.2), "2 evaluations: too few evaluations to see a trend", "Flat"),
    ],
)
def test_the_caption_of_a_run_follows_its_curve(
    scores: tuple[float, ...], words: str, never: str
) -> None:
    run = run_of(with_scores(*scores))
    caption = learning_caption(run, scale_of_run(run))
    assert words in caption and never not in caption


def test_the_caption_of_a_study_names_the_methods_by_trend() -> None:
    record = compare_record()
    for cell in record["cells"]:
        if cell["run"]:
            rising = cell["method"] == "lora"
            scores = (0.0, 0.2, 0.4, 0.6) if rising else (0.0, 0.6, 0.6, 0.6)
            cell["run"]["metrics"]["history"] = with_scores(*scores)["metrics"]["history"]
            cell["run"]["metrics"]["initial"] = None
    caption = curves_caption(study_of(record), record["tasks"][0])
    assert "Still improving at the end: lora. Longer training may raise the score." in caption
    assert "Flat at the end: sparsegrad." in caption and "Worse" not in caption


def test_overfitting_is_named_only_if_the_losses_part() -> None:
    record = with_scores(0.3, 0.5, 0.4, 0.3)  # the validation loss is lowest at step 10
    record["metrics"]["train"] = [
        {"step": at, "epoch": 1.0, "loss": 1 / (at + 1), "learning_rate": 0.1} for at in range(6)
    ]
    caption = loss_caption(run_of(record))
    assert caption.startswith("Cross-entropy. ") and "lowest at step 10 (0.5)" in caption
    record["task"]["regression"] = True
    assert loss_caption(run_of(record)).startswith("Mean squared error. ")
    record["metrics"]["train"] = [{"step": 1, "epoch": 1.0, "loss": 1.0, "learning_rate": 0.1}]
    assert "overfits" not in loss_caption(run_of(record))
    record["metrics"]["train"] = [
        {"step": at, "epoch": 1.0, "loss": 1.0 - at / 6, "learning_rate": 0.1} for at in range(6)
    ]
    assert "the model overfits" in loss_caption(run_of(record))
