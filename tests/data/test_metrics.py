"""Metrics against their formulas, and the cases that a formula leaves undefined."""

from __future__ import annotations

import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsegrad_cli.data import metrics
from sparsegrad_cli.data.metrics import LOWEST, mean_loss, metric_values, score, task_metric
from sparsegrad_cli.errors import DataError
from sparsegrad_cli.recipe.tasks import BUILTIN_TASKS, CLASS_METRICS, GLUE_TASKS, TaskSpec

COLA, MRPC, MNLI, STSB = (GLUE_TASKS[name] for name in ("cola", "mrpc", "mnli", "stsb"))


@pytest.fixture(autouse=True)
def no_warnings() -> Any:
    """Make warnings errors: every degenerate case is handled."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # of imports
        yield


# --- the formulas, in float64


def confusion(predicted: np.ndarray, true: np.ndarray, classes: int) -> np.ndarray:
    table = np.zeros((classes, classes))
    for row, column in zip(true, predicted, strict=True):
        table[row, column] += 1
    return table


def matthews(predicted: np.ndarray, true: np.ndarray, classes: int) -> float:
    """Gorodkin 2004, the multi-class form; for two classes it is Matthews' own."""
    c = confusion(predicted, true, classes)
    n, right = c.sum(), np.trace(c)
    t, p = c.sum(1), c.sum(0)
    return float((right * n - t @ p) / np.sqrt((n**2 - p @ p) * (n**2 - t @ t)))


def f1(predicted: np.ndarray, true: np.ndarray, positive: int) -> float:
    hits = np.sum((predicted == positive) & (true == positive))
    return float(2 * hits / (np.sum(predicted == positive) + np.sum(true == positive)))


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum()))


def ranks(x: np.ndarray) -> np.ndarray:
    """Ranks with ties at their mean."""
    return np.array([(x < v).sum() + ((x == v).sum() + 1) / 2 for v in x])


@pytest.mark.parametrize("seed", range(5))
def test_classification_formulas(seed: int) -> None:
    generator = np.random.default_rng(seed)
    logits, true = generator.normal(size=(97, 2)), generator.integers(0, 2, 97)
    predicted = logits.argmax(1)
    values = score(COLA, logits, true).values
    assert values["matthews_correlation"] == pytest.approx(matthews(predicted, true, 2), abs=1e-12)
    assert values["accuracy"] == np.mean(predicted == true)
    both = score(MRPC, logits.astype(np.float32), true)
    assert both.values["f1"] == pytest.approx(f1(predicted, true, 1), abs=1e-12)
    assert list(both.values) == ["accuracy", "f1"] and both.notes == ()


def test_matthews_by_its_two_class_formula() -> None:
    predicted, true = np.array([1] * 6 + [0] * 4), np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 1])
    tp, fp, tn, fn = 4, 2, 3, 1
    expected = (tp * tn - fp * fn) / np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert score(COLA, np.eye(2)[predicted], true).values["matthews_correlation"] == pytest.approx(
        expected, abs=1e-12
    )


def test_f1_of_three_classes_is_their_mean() -> None:
    generator = np.random.default_rng(7)
    logits, true = generator.normal(size=(60, 3)), generator.integers(0, 3, 60)
    spec = replace(MNLI, metrics=("accuracy", "f1", "matthews_correlation"))
    values = score(spec, logits, true).values
    predicted = logits.argmax(1)
    assert values["f1"] == pytest.approx(np.mean([f1(predicted, true, c) for c in range(3)]))
    assert values["matthews_correlation"] == pytest.approx(matthews(predicted, true, 3))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("classes", [2, 3])
def test_f1_precision_and_recall_are_those_of_scikit_learn(seed: int, classes: int) -> None:
    from sklearn.metrics import precision_recall_fscore_support

    generator = np.random.default_rng(seed)
    logits, true = generator.normal(size=(60, classes)), generator.integers(0, classes, 60)
    names = tuple("abc"[:classes])
    spec = TaskSpec("t", ("text",), "label", names, False, "accuracy", CLASS_METRICS)
    values = score(spec, logits, true).values
    for mean in ("macro", "weighted"):
        expected = precision_recall_fscore_support(true, logits.argmax(1), average=mean)[:3]
        found = [values[f"{name}_{mean}"] for name in ("precision", "recall", "f1")]
        assert found == pytest.approx(expected, abs=1e-12)
    if classes == 2:
        for positive, name in enumerate(names):
            chosen = score(replace(spec, chosen_positive=name), logits, true).values
            expected = precision_recall_fscore_support(
                true, logits.argmax(1), pos_label=positive, average="binary"
            )[:3]
            found = [chosen[metric] for metric in ("precision", "recall", "f1")]
            assert found == pytest.approx(expected, abs=1e-12)


def test_a_mean_over_classes_leaves_out_what_is_neither_true_nor_predicted() -> None:
    spec = replace(MNLI, metrics=("f1_macro", "f1_weighted"))
    result = score(spec, np.eye(3)[[0, 1, 0, 1]], np.array([0, 1, 1, 1]))
    assert result.values["f1_macro"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert result.notes == (
        "class 2 (contradiction) is neither predicted nor true: it is left out of f1_macro",
    )


def test_notes_name_the_positive_class() -> None:
    result = score(replace(MRPC, chosen_positive="not_equivalent"), np.eye(2)[[1, 1]], [1, 1])
    assert result.values == {"accuracy": 1.0, "f1": 0.0}
    assert "class 0 (not_equivalent) is neither" in result.notes[0]


def test_accuracy_and_matthews_do_not_depend_on_the_positive_class() -> None:
    generator = np.random.default_rng(2)
    logits, true = generator.normal(size=(50, 2)), generator.integers(0, 2, 50)
    one, other = (
        score(replace(COLA, chosen_positive=name), logits, true).values
        for name in COLA.label_names or ()
    )
    assert one == other


@pytest.mark.parametrize("shape", [(50,), (50, 1)])
def test_correlation_formulas(shape: tuple[int, ...]) -> None:
    generator = np.random.default_rng(3)
    predicted = np.round(generator.normal(size=50), 1)  # with ties
    true = np.round(predicted + generator.normal(size=50), 1)
    values = score(STSB, predicted.reshape(shape), true).values
    assert values["pearson"] == pytest.approx(pearson(predicted, true), abs=1e-12)
    assert values["spearmanr"] == pytest.approx(pearson(ranks(predicted), ranks(true)), abs=1e-12)


# --- degenerate cases: a defined value and a note


@pytest.mark.parametrize("constant", ["predictions", "references"])
def test_one_class_gives_matthews_zero(constant: str) -> None:
    mixed, same = np.array([0, 1, 0, 1]), np.array([1, 1, 1, 1])
    predicted, true = (same, mixed) if constant == "predictions" else (mixed, same)
    result = score(COLA, np.eye(2)[predicted], true)
    assert result.values == {"matthews_correlation": 0.0, "accuracy": 0.5}
    assert len(result.notes) == 1 and constant in result.notes[0] and "class 1" in result.notes[0]


def test_one_row_is_the_reason_that_is_given() -> None:
    (note,) = score(COLA, np.eye(2)[[1]], [1]).notes
    assert note == "there is one row: matthews_correlation is 0 by definition"
    notes = score(STSB, np.ones(1), np.ones(1)).notes
    assert notes[0] == "there is one row: pearson is 0 by definition"


def test_f1_without_positives() -> None:
    zeros, ones = np.zeros(4, dtype=int), np.ones(4, dtype=int)
    neither = score(MRPC, np.eye(2)[zeros], zeros)
    assert neither.values == {"accuracy": 1.0, "f1": 0.0} and "f1 is 0" in neither.notes[0]
    # Here the formula itself says 0 (or 1): no note.
    assert score(MRPC, np.eye(2)[zeros], ones) == metrics.Scores({"accuracy": 0.0, "f1": 0.0}, ())
    assert score(MRPC, np.eye(2)[ones], ones).values == {"accuracy": 1.0, "f1": 1.0}


@pytest.mark.parametrize("offset", [0.0, 3.7, 1e6])
@pytest.mark.parametrize("constant", ["predictions", "references"])
def test_constant_scores_give_zero(constant: str, offset: float) -> None:
    same, mixed = np.full(5, offset), np.arange(5.0)
    predicted, true = (same, mixed) if constant == "predictions" else (mixed, same)
    result = score(STSB, predicted, true)
    assert result.values == {"pearson": 0.0, "spearmanr": 0.0}
    assert len(result.notes) == 2 and all(constant in note for note in result.notes)


def test_spread_of_rounding_error_counts_as_constant() -> None:
    predicted = 1.0 + np.array([0, 1, 0, 2, 1]) * np.finfo(np.float64).eps
    assert score(STSB, predicted, np.arange(5.0)).values == {"pearson": 0.0, "spearmanr": 0.0}


@pytest.mark.parametrize("scale", [1e-200, 1e200, 1e308])
def test_extreme_scores_are_never_nan(scale: float) -> None:
    values = score(STSB, np.array([0.1, 0.9, 0.3]) * scale, np.array([1.0, 2.0, 1.5])).values
    assert values["spearmanr"] == 1.0
    assert np.isfinite(values["pearson"])


def test_a_single_example_has_a_value() -> None:
    assert score(STSB, np.array([1.0]), np.array([2.0])).values == {"pearson": 0, "spearmanr": 0}
    assert score(COLA, np.array([[0.0, 1.0]]), np.array([1])).values["accuracy"] == 1.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("spec", [COLA, MRPC, STSB], ids=["cola", "mrpc", "stsb"])
def test_broken_logits_give_the_lowest_value(spec: TaskSpec, bad: float) -> None:
    logits = np.random.default_rng(0).normal(size=(6, 1 if spec.regression else 2))
    logits[2, 0] = bad
    result = score(spec, logits, np.array([0, 1, 0, 1, 1, 0]))
    assert result.values == {name: LOWEST[name] for name in spec.metrics}
    assert len(result.notes) == 1 and "1 of 6 examples" in result.notes[0]


def test_nothing_to_score_and_shapes_that_do_not_fit() -> None:
    with pytest.raises(DataError, match="no examples"):
        score(COLA, np.zeros((0, 2)), np.zeros(0, dtype=int))
    for logits in (np.zeros(4), np.zeros((3, 2)), np.zeros((4, 2, 2))):
        with pytest.raises(ValueError, match="do not fit"):
            score(COLA, logits, np.zeros(4, dtype=int))
    with pytest.raises(ValueError, match="do not fit"):
        score(STSB, np.zeros((4, 2)), np.zeros(4))


# --- all metrics of a task


def test_every_task_has_its_official_metrics() -> None:
    expected = {
        "cola": ["matthews_correlation", "accuracy"],
        "mrpc": ["accuracy", "f1"],
        "qqp": ["accuracy", "f1"],
        "stsb": ["pearson", "spearmanr"],
    }
    generator = np.random.default_rng(1)
    for name, spec in GLUE_TASKS.items():
        classes = len(spec.label_names or ("score",))
        true = generator.permutation(np.arange(40) % max(classes, 2))
        values = score(spec, generator.normal(size=(40, classes)), true).values
        assert list(values) == expected.get(name, ["accuracy"])
        assert spec.metric == next(iter(values)) and all(-1 <= v <= 1 for v in values.values())
    assert BUILTIN_TASKS["builtin:acceptability"].metric == "matthews_correlation"


def test_importing_the_metrics_imports_no_heavy_library() -> None:
    code = (
        "import sys; from sparsegrad_cli.data import metrics; "
        "heavy = {'torch', 'datasets', 'evaluate', 'sklearn', 'scipy', 'pandas', 'transformers'}; "
        "print(heavy & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_values_from_answers() -> None:
    spec = replace(COLA, metrics=("accuracy", "f1"))
    result = metric_values(spec, np.array([1.0, 1.0]), np.array([1, 0]))
    assert result.values == {"accuracy": 0.5, "f1": pytest.approx(2 / 3)}


# --- the loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_the_cross_entropy_that_torch_computes(smoothing: float) -> None:
    import torch

    drawn = np.random.default_rng(0)
    logits, labels = 30 * drawn.standard_normal((50, 3)), drawn.integers(3, size=50)
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits), torch.from_numpy(labels), label_smoothing=smoothing
    )
    found = mean_loss(MNLI, logits.astype(np.float64), labels, smoothing=smoothing)
    assert found == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_loss_of_scores_is_their_mean_squared_error(shape: tuple[int, ...]) -> None:
    found = mean_loss(STSB, np.array([1.0, 2.0, 3.0, 4.0]).reshape(shape), [1.0, 0.0, 3.5, 4.0])
    assert found == (4 + 0.25) / 4


@pytest.mark.parametrize("lost", [np.nan, np.inf])
def test_a_nan_logit_gives_a_nan_loss(lost: float) -> None:
    assert np.isnan(mean_loss(COLA, [[0.0, lost], [1.0, 2.0]], [0, 1]))


def test_a_task_has_an_evaluate_metric_that_leaves_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import evaluate

    monkeypatch.chdir(tmp_path)
    one, two = task_metric()(COLA), task_metric()(COLA)
    assert isinstance(one, evaluate.Metric)
    one.add_batch(predictions=[1, 0], references=[1, 0])
    two.add_batch(predictions=[1, 0], references=[0, 1])
    assert one.compute()["matthews_correlation"] == 1.0
    assert two.compute()["matthews_correlation"] == -1.0
    scores = task_metric()(STSB).compute(predictions=[1, 2, 3], references=[2, 4, 7])
    assert scores["spearmanr"] == pytest.approx(1.0)
    assert not list(tmp_path.iterdir())
