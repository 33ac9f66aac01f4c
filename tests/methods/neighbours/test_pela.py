"""PELA: the distillation and the training of the factors against references in float64."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from support.one_layer import OneLayer, Parameters, ReferenceAdamW, check_steps
from support.resumed_runs import resumed_run
from support.tiny_models import HIDDEN, INNER, Tuned, batch, classifier, run_data, targets_of
from torch import Tensor
from torch.nn import functional as F

from sparsegrad_cli.errors import NonFiniteError
from sparsegrad_cli.methods.base import TargetShapes
from sparsegrad_cli.methods.implementation import TrainingData
from sparsegrad_cli.methods.neighbours.factor_settings import PelaSettings
from sparsegrad_cli.methods.neighbours.low_rank import FactoredLinear, best_factors
from sparsegrad_cli.recipe.schema import TrainSection

RATE, ALPHA, BETA, STAGE = 0.02, 3.0, 0.7, 3
SETTINGS = PelaSettings(
    name="pela",
    compression=1.2,
    distill_learning_rate=RATE,
    feature_weight=ALPHA,
    perturbation_weight=BETA,
)


class OneFactored(OneLayer):
    """A layer whose weight a method replaced by factors."""

    def parameters(self) -> Parameters:
        layer = self.layer
        return {"b": layer.b.detach().clone(), "a": layer.a.detach().clone()}


def pull(p: Parameters, g_OI: Tensor) -> Parameters:
    return {"b": g_OI @ p["a"].T, "a": p["b"].T @ g_OI}


def data(one: OneLayer) -> TrainingData:
    """Batches 20, 21 and 22, which the training steps do not use."""
    batches = [dict(zip("xw", one.batch(20 + n), strict=True)) for n in range(STAGE)]
    return TrainingData(9, lambda: iter(batches), lambda inputs: one.loss(**named(inputs)))


def named(inputs: object) -> dict[str, Tensor]:
    assert isinstance(inputs, dict)
    return {"x": inputs["x"], "wanted": inputs["w"]}


def test_the_stage_before_training_is_that_of_the_formula() -> None:
    one = OneFactored(SETTINGS, training=data)
    u, s, v = torch.linalg.svd(one.weight_OI)
    root = s[:2].sqrt()
    start = {"b": u[:, :2] * root, "a": root[:, None] * v[:2]}
    train = TrainSection(learning_rate=RATE, weight_decay=0.0)
    reference = ReferenceAdamW(start, train)
    for step in range(STAGE):
        p = reference.p
        x_NI, wanted_NO = one.batch(20 + step)
        y_NO = F.linear(x_NI, p["b"] @ p["a"], one.bias_O)
        feature_NO = F.linear(x_NI, one.weight_OI, one.bias_O)
        g_OI = (y_NO - wanted_NO).T @ x_NI
        g_OI = g_OI + ALPHA * 2 / y_NO.numel() * (y_NO - feature_NO).T @ x_NI
        deviation_OI = one.weight_OI - p["b"] @ p["a"]
        worst = divmod(int(deviation_OI.abs().argmax()), one.inn)
        g_OI[worst] -= BETA * deviation_OI[worst].sign()
        reference.step(pull(p, g_OI))
    for name, expected in reference.p.items():
        torch.testing.assert_close(one.start[name], expected, rtol=1e-9, atol=1e-11)
        assert not torch.allclose(expected, start[name], atol=1e-3)
    assert f"distilled for {STAGE} steps" in one.prepared.counts.note
    assert all(p.grad is None for p in one.model.parameters())


def test_training_steps_are_those_of_the_formula() -> None:
    one = OneFactored(SETTINGS, training=data)
    check_steps(one, lambda p: p["b"] @ p["a"] - one.weight_OI, pull)


def test_the_factors_have_fewer_parameters_by_the_ratio() -> None:
    shapes = TargetShapes(targets_of(classifier()))
    settings = PelaSettings(name="pela", compression=2.0)
    rank = int(HIDDEN * INNER / 2 / (HIDDEN + INNER))
    assert settings.sizing(shapes).trainable == 6 * rank * (HIDDEN + INNER)
    assert settings.rank(3072, 768) == 307
    assert settings.rank(2, 2) == 1


def test_distillation_brings_the_outputs_back_to_those_of_the_base_model() -> None:
    before = classifier()(**batch()).logits
    distances = []
    for run_steps in (None, 10):
        model = classifier()
        settings = PelaSettings(name="pela", distill_learning_rate=3e-3, feature_weight=100.0)
        training = None if run_steps is None else run_data(model, run_steps, count=60)
        method = settings.implementation()
        method.prepare(model, targets_of(model), scope="head", training=training)
        distances.append(features_apart(model))
        assert not torch.equal(model(**batch()).logits, before)
    assert distances[1] < 0.7 * distances[0]


def features_apart(model: torch.nn.Module) -> float:
    """Return the distance of the last hidden states to those of the base model."""
    with torch.no_grad():
        inputs = {key: value for key, value in batch().items() if key != "labels"}
        bodies: list[Any] = [m.get_submodule("bert") for m in (model, classifier())]
        found, wanted = (body(**inputs).last_hidden_state for body in bodies)
    return float(F.mse_loss(found, wanted))


def test_the_stage_leaves_no_trace_in_the_model() -> None:
    tuned = Tuned("pela", scope="rest", run_steps=8)
    assert not any(module._forward_hooks for module in tuned.model.modules())
    assert all(p.grad is None for p in tuned.model.parameters())
    assert not any(module.training for module in tuned.model.modules())
    base = dict(classifier().named_parameters())
    for name, parameter in tuned.model.named_parameters():
        if name in base:
            assert torch.equal(parameter, base[name]), "only the factors are distilled"


def test_a_resumed_run_is_bitwise_the_same(tmp_path: Path) -> None:
    resumed_run("pela", 3, tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_distilled_in_float32(dtype: torch.dtype) -> None:
    tuned = Tuned("pela", scope="rest", dtype=dtype)
    assert "distilled for 3 steps" in tuned.prepared.counts.note
    for target in tuned.targets:
        layer = tuned.model.get_submodule(target.name)
        assert isinstance(layer, FactoredLinear)
        assert layer.b.dtype == layer.a.dtype == torch.float32
        assert layer.b.isfinite().all() and layer.a.isfinite().all()


def test_a_loss_that_is_not_finite_is_refused() -> None:
    model = classifier()
    training = run_data(model, 5)
    broken = dataclasses.replace(training, loss=lambda batch: training.loss(batch) * torch.inf)
    method = PelaSettings(name="pela").implementation()
    with pytest.raises(NonFiniteError, match="calibration batch 1 is inf"):
        method.prepare(model, targets_of(model), scope="head", training=broken)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_best_factors_are_the_best_approximation(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    b_OR, a_RI = best_factors(matrix, 2)
    error = torch.linalg.svdvals(matrix)[2:].square().sum()
    torch.testing.assert_close((matrix - b_OR @ a_RI).square().sum(), error)
