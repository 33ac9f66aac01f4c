"""What every method that trains a change of W shares, held for each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.one_layer import OneLayer, drawn
from support.quantized_models import body_folder, loaded, need_bitsandbytes
from support.tiny_models import batch, classifier, one_thread, targets_of
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from sparsegrad_cli.methods.base import TargetShapes
from sparsegrad_cli.methods.implementation import TrainingData
from sparsegrad_cli.methods.neighbours.adaptive_settings import ADAPTIVE
from sparsegrad_cli.methods.neighbours.change import ChangedLinear
from sparsegrad_cli.methods.neighbours.change_settings import CHANGES, ChangeSettings
from sparsegrad_cli.numerics.seeding import temporary_seed
from sparsegrad_cli.recipe.load_recipe import load_recipe
from sparsegrad_cli.recipe.schema import TrainSection

# Methods whose change is one of W beside it, sized by a rank.
NEIGHBOURS = CHANGES | ADAPTIVE
NAMES = [name for name, settings in NEIGHBOURS.items() if issubclass(settings, ChangeSettings)]
every_change = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def settings_of(name: str, **more: Any) -> Any:
    """Return settings of rank 3, which fits every tiny layer."""
    return NEIGHBOURS[name](name=name, **{"rank": 3, **more})


def trained(name: str, **more: Any) -> OneLayer:
    one = OneLayer(settings_of(name), **more)
    one.steps(3)
    one.model.eval()  # without the noise that some methods add in training
    return one


@every_change
@pytest.mark.parametrize("transposed", [False, True])
def test_merged_weight_and_factors_compute_what_the_layer_does(name: str, transposed: bool) -> None:
    one = trained(name, transposed=transposed)
    x_NI = drawn(4, one.inn, seed=7)
    found_NO = one.layer(x_NI)
    merged_OI = one.method.merged_OI(one.model, one.target)
    torch.testing.assert_close(x_NI @ merged_OI.T + one.bias_O, found_NO, rtol=1e-11, atol=1e-12)
    assert not torch.allclose(merged_OI, one.weight_OI, atol=1e-4)
    factors = one.method.factors(one.model, one.target)
    if factors is not None:
        delta_OI = merged_OI - one.weight_OI
        torch.testing.assert_close(factors.product_OI(), delta_OI, rtol=1e-11, atol=1e-12)
    change = one.layer.change(x_NI)
    torch.testing.assert_close(change, found_NO - (x_NI @ one.weight_OI.T + one.bias_O))


@every_change
def test_an_adapter_loads_where_other_numbers_are_drawn_and_no_run_follows(name: str) -> None:
    one, other = trained(name), OneLayer(settings_of(name), seed=9, run=False)
    tensors = one.method.adapter_tensors(one.model)
    other.method.load_adapter(other.model, tensors)
    other.model.eval()
    expected_OI = one.method.merged_OI(one.model, one.target)
    assert torch.equal(other.method.merged_OI(other.model, other.target), expected_OI)
    assert torch.equal(other.layer(drawn(4, 5)), one.layer(drawn(4, 5)))


# SNELL's threshold counts as a constant in its gradient: see its own test.
@pytest.mark.parametrize("name", [name for name in NAMES if name != "snell"])
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    one = trained(name)
    named = {n: p for n, p in one.layer.named_parameters() if p.requires_grad}
    x = drawn(2, 3, one.inn, seed=7).requires_grad_()

    def output(x: Tensor, *values: Tensor) -> Tensor:
        replaced = dict(zip(named, values, strict=True))
        found: Tensor = torch.func.functional_call(one.layer, replaced, (x,))
        return found

    assert torch.autograd.gradcheck(output, (x, *named.values()))


@every_change
def test_nothing_as_wide_as_the_output_is_saved(name: str) -> None:
    """One copy of x at most, in its own dtype, and narrow products."""
    one = OneLayer(settings_of(name, rank=1), dtype=torch.bfloat16)
    tokens, kept = 64, []
    x = drawn(tokens, one.inn, seed=7, dtype=torch.bfloat16).requires_grad_()

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        one.layer(x)
    wide = [t for t in kept if t.numel() >= tokens * one.inn]
    assert len(wide) <= 1 and all(t.data_ptr() == x.data_ptr() for t in wide)


@every_change
def test_half_precision_weights_keep_float32_parameters(name: str) -> None:
    one = OneLayer(settings_of(name), dtype=torch.bfloat16)
    assert {p.dtype for p in one.layer.change.parameters() if p.requires_grad} == {torch.float32}
    x = drawn(4, one.inn, seed=7, dtype=torch.bfloat16)
    assert one.layer(x).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        y = one.layer(x.float())
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(
        p.grad.dtype == torch.float32 for p in one.layer.change.parameters() if p.grad is not None
    )


@every_change
def test_counts_are_the_parameters_of_each_layer(name: str) -> None:
    settings = settings_of(name)
    model = classifier("llama")
    targets = targets_of(model)
    sizing = settings.sizing(TargetShapes(targets))
    with temporary_seed(0):
        prepared = settings.implementation().prepare(model, targets, scope="head")
    assert sizing.trainable == prepared.counts.trainable_targets
    changed = {n: m for n, m in model.named_modules() if isinstance(m, ChangedLinear)}
    by_layer = {c.target.name: c.entries for c in prepared.counts.targets}
    assert {
        n: sum(p.numel() for p in m.change.parameters() if p.requires_grad)
        for n, m in changed.items()
    } == by_layer


@every_change
def test_match_solves_the_nearest_size(name: str) -> None:
    recipe = load_recipe(None, (f"method.name={name}", "method.density=0.03", "match=trainable"))
    settings: Any = recipe.recipe.method
    targets = targets_of(classifier())
    size, requested = settings.size_on(targets), settings.requested(targets)
    assert requested == sum(round(0.03 * t.size) for t in targets)
    distance = {n: abs(settings.total(targets, n) - requested) for n in range(1, 65)}
    assert distance[size] == min(distance.values())


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
@every_change
def test_it_trains_beside_quantized_weights(
    name: str, bits: str, bodies: Callable[[str], Path]
) -> None:
    model = loaded(bodies("llama"), bits)
    settings, targets = settings_of(name), targets_of(model)
    before = model(**batch()).logits.detach()
    method = settings.implementation()
    data = TrainingData(4, lambda: iter([batch(seed=5)]), lambda inputs: model(**inputs).loss)
    with temporary_seed(0):
        method.prepare(model, targets, scope="head", training=data)
    assert settings.starts_changed or torch.equal(model(**batch()).logits, before)
    optimizer = method.optimizer(model, TrainSection(learning_rate=1e-2))
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    target = targets[0]
    x = drawn(3, target.in_features, dtype=torch.float32)
    layer = model.get_submodule(target.name)
    merged_OI = method.merged_OI(model, target)
    torch.testing.assert_close(layer(x).double(), x.double() @ merged_OI.T, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def bodies(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    need_bitsandbytes()
    place = tmp_path_factory.mktemp("bodies")
    return lambda architecture: body_folder(place / architecture, architecture)
