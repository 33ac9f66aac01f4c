"""WeLoRe: ranks against the paper's search, steps on the factors against a reference in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.one_layer import OneLayer, Parameters, check_steps, drawn
from support.tiny_models import HIDDEN, INNER, Tuned, batch, classifier, targets_of
from torch import Tensor, nn

from sparsegrad_cli.errors import SparsegradError, UsageError
from sparsegrad_cli.methods.base import TargetShapes
from sparsegrad_cli.methods.neighbours.factor_settings import WeloreSettings
from sparsegrad_cli.methods.neighbours.low_rank import FactoredLinear
from sparsegrad_cli.methods.neighbours.welore import ranks_by_threshold
from sparsegrad_cli.recipe.schema import TrainSection

UNIFORM = WeloreSettings(name="welore", allocation="uniform", reduction=0.6)


class OneFactored(OneLayer):
    """A layer whose weight a method replaced by factors."""

    def parameters(self) -> Parameters:
        layer = self.layer
        return {"b": layer.b.detach().clone(), "a": layer.a.detach().clone()}


def pull(p: Parameters, g_OI: Tensor) -> Parameters:
    return {"b": g_OI @ p["a"].T, "a": p["b"].T @ g_OI}


@pytest.mark.parametrize("transposed", [False, True])
def test_steps_are_those_of_the_formula(transposed: bool) -> None:
    one = OneFactored(UNIFORM, transposed=transposed)
    u, s, v = np.linalg.svd(one.weight_OI.numpy())
    best = torch.from_numpy((u[:, :2] * s[:2]) @ v[:2])  # 40 % of rank 5
    torch.testing.assert_close(one.start["b"] @ one.start["a"], best)
    balanced = one.start["b"].T @ one.start["b"]
    torch.testing.assert_close(balanced, torch.from_numpy(np.diag(s[:2])))
    assert one.layer.weight.shape == ((5, 6) if transposed else (6, 5))
    check_steps(one, lambda p: p["b"] @ p["a"] - one.weight_OI, pull)


def test_the_threshold_is_common_to_all_modules() -> None:
    spectra = {
        "fast": torch.tensor([8.0, 1.0, 0.4, 0.2]),  # scaled: 1, .125, .05, .025
        "flat": torch.tensor([2.0, 1.9, 1.8, 1.0]),  # scaled: 1, .95, .9, .5
    }
    # By hand: four of eight lie below .5 and a step: .505 is the first multiple above.
    assert ranks_by_threshold(spectra, 0.5) == {"fast": 1, "flat": 3}
    assert ranks_by_threshold(spectra, 0.375) == {"fast": 1, "flat": 4}
    assert ranks_by_threshold(spectra, 0.125) == {"fast": 3, "flat": 4}
    assert ranks_by_threshold(spectra, 0.99) == {"fast": 1, "flat": 1}


def lower_rank(model: nn.Module, names: list[str]) -> None:
    """Make the spectra of these modules fall fast."""
    for name in names:
        weight = model.get_submodule(name).weight
        assert isinstance(weight, nn.Parameter)
        rows, columns = weight.shape
        low = drawn(rows, 2, seed=1) @ drawn(2, columns, seed=2)
        weight.data = (0.05 * low + 0.002 * drawn(rows, columns, seed=3)).float()


def test_only_modules_of_low_rank_are_replaced_and_train() -> None:
    model = classifier()
    targets = targets_of(model)
    names = [target.name for target in targets]
    low = names[1:3]
    lower_rank(model, low)
    method = WeloreSettings(name="welore", reduction=0.4).implementation()
    prepared = method.prepare(model, targets, scope="head")
    replaced = {n: m.rank for n, m in model.named_modules() if isinstance(m, FactoredLinear)}
    assert replaced == dict.fromkeys(low, 2)
    entries = {count.target.name: count.entries for count in prepared.counts.targets}
    assert entries == {n: 2 * (HIDDEN + INNER) if n in low else 0 for n in names}
    assert "in 2 of 6 targets" in prepared.counts.note
    whole = names[0]
    before = model.get_parameter(f"{whole}.weight").clone()
    optimizer = method.optimizer(model, TrainSection(learning_rate=1e-2))
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch()).loss.backward()
        optimizer.step()
    assert torch.equal(model.get_parameter(f"{whole}.weight"), before)
    merged_OI = method.merged_OI(model, targets[0])
    torch.testing.assert_close(merged_OI.float(), before)
    assert method.factors(model, targets[1]) is None
    fresh, other = classifier(), WeloreSettings(name="welore", reduction=0.4).implementation()
    lower_rank(fresh, low)
    other.prepare(fresh, targets, scope="head")
    other.load_adapter(fresh, method.adapter_tensors(model))
    model.eval()
    assert torch.equal(fresh(**batch()).logits, model(**batch()).logits)


def test_spectra_that_fall_slowly_everywhere_are_refused() -> None:
    model = classifier()
    method = WeloreSettings(name="welore", reduction=0.1).implementation()
    with pytest.raises(SparsegradError, match="keep half of their rank") as caught:
        method.prepare(model, targets_of(model), scope="head")
    assert caught.value.fix is not None and "uniform" in caught.value.fix


def test_shapes_alone_do_not_say_the_ranks() -> None:
    shapes = TargetShapes(targets_of(classifier()))
    spectrum = WeloreSettings(name="welore")
    with pytest.raises(UsageError, match="singular values"):
        spectrum.sizing(shapes)
    assumed, notes = spectrum.settle_for_estimate(shapes)
    assert assumed.allocation == "uniform" and "same share" in notes[0]
    assert UNIFORM.sizing(shapes).trainable == 6 * 6 * (HIDDEN + INNER)
    assert UNIFORM.settle_for_estimate(shapes) == (UNIFORM, [])


def test_an_adapter_of_other_ranks_brings_its_own() -> None:
    tuned = Tuned("welore")
    tuned.steps(2)
    model = classifier()
    other = UNIFORM.implementation()
    other.prepare(model, targets_of(model), scope="head")
    other.load_adapter(model, tuned.method.adapter_tensors(tuned.model))
    assert torch.equal(model.eval()(**batch(seed=7)).logits, tuned.logits())
