"""The test over seeds and rows against sums written out, and against simulated studies."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import accuracy_score, matthews_corrcoef

from sparsegrad_cli.recipe.tasks import GLUE_TASKS
from sparsegrad_cli.study.crossed import Layout, crossed, layout, pseudo_values


def test_pseudovalues_of_accuracy_are_right_or_wrong() -> None:
    labels, predictions = [0, 1, 1, 0, 1], [0, 1, 0, 0, 0]
    found = pseudo_values(GLUE_TASKS["rte"], labels, predictions)
    assert found == pytest.approx([1, 1, 0, 1, 0])
    assert found.mean() == pytest.approx(accuracy_score(labels, predictions))


def test_pseudovalues_of_matthews_by_leaving_each_row_out() -> None:
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 2, 60)
    predictions = np.where(draw.random(60) < 0.7, labels, 1 - labels)
    whole = matthews_corrcoef(labels, predictions)
    by_hand = [
        60 * whole - 59 * matthews_corrcoef(np.delete(labels, i), np.delete(predictions, i))
        for i in range(60)
    ]
    assert pseudo_values(GLUE_TASKS["cola"], labels, predictions) == pytest.approx(by_hand)


def test_pseudovalues_of_scores() -> None:
    draw = np.random.default_rng(1)
    labels = draw.random(12)
    predictions = labels + draw.normal(size=12)
    spec = GLUE_TASKS["stsb"]
    found = pseudo_values(spec, labels.tolist(), predictions.tolist())
    correlate = stats.pearsonr if spec.metric == "pearson" else stats.spearmanr
    whole = correlate(predictions, labels)[0]
    first = 12 * whole - 11 * correlate(predictions[1:], labels[1:])[0]
    assert found[0] == pytest.approx(first)


def test_the_layout_is_the_two_way_table_of_squares() -> None:
    values = np.array([[3.0, 1.0, 2.0, 6.0], [1.0, 0.0, 2.0, 1.0], [2.0, 2.0, 5.0, 3.0]])
    means = values.mean(axis=1)
    found = layout(values, means)
    grand = values.mean()
    assert found.mean == pytest.approx(grand)
    seeds = 4 * sum((row.mean() - grand) ** 2 for row in values)
    rows = 3 * sum((column.mean() - grand) ** 2 for column in values.T)
    total = float(((values - grand) ** 2).sum())
    assert found.ms_seeds == pytest.approx(seeds / 2)
    assert found.ms_rows == pytest.approx(rows / 3)
    assert found.ms_rest == pytest.approx((total - seeds - rows) / 6)


def test_a_bias_of_the_pseudovalues_is_removed() -> None:
    values = np.random.default_rng(2).normal(size=(3, 50))
    means = np.array([0.1, 0.2, 0.4])
    assert layout(values, means).mean == pytest.approx(0.7 / 3)
    assert layout(values + 5.0, means) == pytest.approx(layout(values, means))


def test_with_rows_that_agree_it_is_the_paired_t_test() -> None:
    """Without variance of the rows, only the seeds count: Student's t with S - 1 degrees."""
    means = np.array([0.03, 0.01, 0.02, 0.05])
    found = crossed([layout(np.repeat(means[:, None], 100, axis=1), means)])
    assert found is not None
    expected = stats.ttest_1samp(means, 0.0)
    assert found.p() == pytest.approx(expected.pvalue)
    assert found.freedom == pytest.approx(3)
    assert found.interval() == pytest.approx(tuple(expected.confidence_interval()))
    assert found.rows_share == pytest.approx(0)


def test_the_formula_of_several_tasks() -> None:
    one = Layout(0.02, 4, 100, ms_seeds=0.5, ms_rows=0.3, ms_rest=0.1)
    two = Layout(-0.01, 3, 50, ms_seeds=0.2, ms_rows=0.05, ms_rest=0.1)
    found = crossed([one, two])
    assert found is not None
    first, second = (0.5 + 0.2) / 400, 0.2 / 150
    assert found.mean == pytest.approx(0.005)
    assert found.error == pytest.approx(math.sqrt((first + second) / 4))
    uncertain = (0.5 / 400 / 4) ** 2 / 3 + (0.2 / 150 / 4) ** 2 / 2
    assert found.freedom == pytest.approx(((first + second) / 4) ** 2 / uncertain)
    assert found.rows_share == pytest.approx((0.2 / 400) / (first + second))


def test_non_inferiority_is_one_sided() -> None:
    found = crossed([Layout(0.0, 5, 100, ms_seeds=0.01, ms_rows=0.0, ms_rest=0.0)])
    assert found is not None
    error = math.sqrt(0.01 / 500)
    assert found.p(least=-0.01) == pytest.approx(stats.t.sf(0.01 / error, 4))
    assert found.p(least=0.01) == pytest.approx(1 - found.p(least=-0.01))


def test_equal_runs_have_no_test() -> None:
    assert crossed([layout(np.zeros((3, 10)), np.zeros(3))]) is None
    assert crossed([]) is None


def test_one_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="two seeds"):
        layout(np.zeros((1, 10)), np.zeros(1))


def test_its_level_under_no_difference() -> None:
    """Seeds and rows both vary: 400 simulated studies reject at about 5 %, a t-test far more."""
    draw = np.random.default_rng(3)
    ours = alone = 0
    for _ in range(400):
        of_seeds, of_rows = draw.normal(size=(4, 1)), draw.normal(size=(1, 100))
        values = 0.1 * of_seeds + 3.0 * of_rows + draw.normal(size=(4, 100))
        means = values.mean(axis=1)
        found = crossed([layout(values, means)])
        assert found is not None
        ours += found.p() < 0.05
        alone += stats.ttest_1samp(means, 0.0).pvalue < 0.05
    assert 6 <= ours <= 36  # 5 % is 20; four standard errors
    assert alone > 100
