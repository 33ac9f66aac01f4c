"""Class weights and several labels a row: the loss by its formula, and that every method trains."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from support import tiny_models
from support.cli_runs import Cli
from support.small_runs import base_folder, data_folder, record, train
from support.tiny_models import METHODS, Tuned
from torch import nn

from sparsegrad_cli.calibration.gradients import micro_batches
from sparsegrad_cli.data.class_weights import class_weights
from sparsegrad_cli.data.metrics import mean_loss
from sparsegrad_cli.errors import RecipeError, UsageError
from sparsegrad_cli.io.atomic import read_tensors
from sparsegrad_cli.models.label_loss import LabelLoss, use_label_loss
from sparsegrad_cli.recipe.load_recipe import load_recipe
from sparsegrad_cli.recipe.tasks import TaskSpec

WEIGHTS = (0.5, 2.0)
SEVERAL = LabelLoss(multilabel=True, weights=WEIGHTS)


def spec(multilabel: bool = False, names: tuple[str, ...] = ("x", "y", "z")) -> TaskSpec:
    return TaskSpec(
        "t", ("text",), "label", names, False, "accuracy", ("accuracy",), multilabel=multilabel
    )


def test_weighted_and_smoothed_cross_entropy_follows_its_formula() -> None:
    draw = np.random.default_rng(1)
    logits, labels = draw.normal(size=(7, 3)), draw.integers(0, 3, size=7)
    weights, smoothing = np.array([0.5, 1.0, 3.0]), 0.1
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    rows = [
        -(1 - smoothing) * weights[y] * logs[n, y] - smoothing / 3 * (weights * logs[n]).sum()
        for n, y in enumerate(labels)
    ]
    loss = LabelLoss(smoothing=smoothing, weights=tuple(weights))
    found = loss(torch.tensor(logits), torch.tensor(labels))
    assert float(found) == pytest.approx(np.mean(rows), rel=1e-12)
    own = mean_loss(spec(), logits, labels, smoothing=smoothing, weights=weights)
    assert own == pytest.approx(np.mean(rows), rel=1e-12)


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    labels = [0] * 6 + [2] * 2 + [1] * 4
    by_sklearn = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    found = class_weights("balanced", spec(), labels)
    assert found is not None and found == pytest.approx(by_sklearn.tolist())
    assert np.mean([found[label] for label in labels]) == pytest.approx(1.0)
    assert class_weights("balanced", spec(), [0, 0, 1, 1]) == (1.0, 1.0, 1.0)  # one of no row
    several = [[1, 0, 1], [0, 0, 1], [0, 0, 1], [0, 1, 1]]
    assert class_weights("balanced", spec(True), several) == (3.0, 3.0, 1.0)
    assert class_weights({"z": 4}, spec(), labels) == (1.0, 1.0, 4.0)
    assert class_weights((1, 2, 3), spec(), labels) == (1.0, 2.0, 3.0)
    with pytest.raises(UsageError, match="'w' is not a class of t"):
        class_weights({"w": 4}, spec(), labels)
    with pytest.raises(UsageError, match="each of the 3 classes, got 2"):
        class_weights((1, 2), spec(), labels)


def with_labels(size: int = 8, length: int = 6, seed: int = 0) -> dict[str, torch.Tensor]:
    inputs = plain_batch(size, length, seed)
    draw = torch.Generator().manual_seed(seed)
    inputs["labels"] = torch.randint(2, (size, 2), generator=draw).float()
    return inputs


plain_batch, plain_classifier = tiny_models.batch, tiny_models.classifier


def weighted(architecture: str, seed: int = 0, **overrides: Any) -> nn.Module:
    model: Any = plain_classifier(architecture, seed, **overrides)
    model.config.problem_type = "multi_label_classification"
    use_label_loss(model, SEVERAL)
    loaded: nn.Module = model
    return loaded


@pytest.fixture
def several_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the tiny models and their batches several labels a row, and weights."""
    monkeypatch.setattr(tiny_models, "batch", with_labels)
    monkeypatch.setattr(tiny_models, "classifier", weighted)


@pytest.mark.usefixtures("several_labels")
@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_on_the_weighted_loss_of_several_labels(name: str) -> None:
    tuned = Tuned(name)  # With the calibration that the method needs.
    inputs = with_labels(seed=5)
    tuned.model.eval()
    with torch.no_grad():
        output = tuned.model(**inputs)
    logits, true = output.logits.double(), inputs["labels"].double()
    own = torch.tensor(WEIGHTS) * true * logits.sigmoid().log()
    expected = -(own + (1 - true) * (1 - logits.sigmoid()).log()).mean()
    assert float(output.loss) == pytest.approx(float(expected), rel=1e-5)
    tuned.model.train()
    first = tuned.step(inputs)
    for _ in range(8):
        last = tuned.step(inputs)
    assert math.isfinite(last) and last < first


def test_parts_of_a_batch_add_up_to_its_weighted_loss() -> None:
    model = weighted("bert")
    inputs = with_labels(size=7, seed=3)
    whole = float(model(**inputs).loss.detach())
    parts = micro_batches(inputs, 3)
    assert [len(part["labels"]) for part, _ in parts] == [3, 3, 1]
    assert sum(
        float(model(**part).loss.detach()) * share for part, share in parts
    ) == pytest.approx(whole)


def test_accumulated_micro_batches_equal_one_large_batch(tmp_path: Path) -> None:
    """Weights are of rows, so it makes no difference which rows share a micro-batch."""
    still: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    base, data = base_folder(tmp_path / "base", **still), data_folder(tmp_path / "data")
    rows = (data / "train.csv").read_text().splitlines()
    low = [row for row in rows[1:] if row.endswith("low")][:9]
    high = [row for row in rows[1:] if row.endswith("high")]
    (data / "train.csv").write_text("\n".join([rows[0], *low, *high]) + "\n")
    tensors, losses = [], []
    for size, count in ((8, 1), (2, 4)):
        run = train(
            tmp_path / f"run{size}",
            base,
            data,
            "method=lora",
            "train.class_weights=balanced",
            f"train.per_device_train_batch_size={size}",
            f"train.gradient_accumulation_steps={count}",
            "train.optim=sgd",  # Adam would enlarge rounding errors of tiny gradients.
        )
        tensors.append(read_tensors(run / "adapter" / "adapter_model.safetensors"))
        losses.append(record(run)["metrics"]["final"]["loss"])
    total = len(low) + len(high)
    weights = record(tmp_path / "run8")["task"]["class_weights"]
    assert weights == {
        "high": pytest.approx(total / 2 / len(high)),
        "low": pytest.approx(total / 2 / len(low)),
    }
    for name, tensor in tensors[0].items():
        torch.testing.assert_close(tensors[1][name], tensor, rtol=1e-4, atol=1e-6, msg=name)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (("task=glue/stsb", "train.class_weights=balanced"), "class weights need classes"),
        (("task=builtin:dialogues", "train.class_weights=balanced"), "has none"),
        (("train.class_weights=0.5",), "a list of weights, got 0.5"),
        (("train.class_weights={a: 0}",), "expected weights above 0, got 0"),
        (("train.class_weights=balance",), "expected balanced"),
    ],
)
def test_weights_without_effect_or_sense_are_refused(settings: tuple[str, ...], says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(None, settings, data=False)
    assert says in str(caught.value)


def test_validate_finds_weights_that_do_not_fit_the_data(tmp_path: Path, cli: Cli) -> None:
    data = data_folder(tmp_path / "data")
    for weights, says in (
        ("{hihg: 2}", "'hihg' is not a class of csv"),
        ("[1, 2, 3]", "a weight for each of the 2 classes, got 3"),
    ):
        ended = cli("validate", "task=csv", f"task.path={data}", f"train.class_weights={weights}")
        assert (ended.code, says in ended.flat, "train.class_weights" in ended.flat) == (
            *(2, True, True),
        ), ended.err
