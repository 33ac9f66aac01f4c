"""SHiRA's masks, against the definitions of the paper written out on the gradients of autograd."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from support.tiny_models import batch, batches, classifier, logits, one_thread, targets_of
from torch import Tensor, nn

from sparsegrad_cli.errors import RecipeError
from sparsegrad_cli.methods.implementation import TrainingData
from sparsegrad_cli.methods.peft_types.settings import PeftSettings
from sparsegrad_cli.methods.peft_types.shira_masks import struct_mask
from sparsegrad_cli.methods.registry import spelled_out
from sparsegrad_cli.models.targets import Target
from sparsegrad_cli.recipe.load_recipe import load_recipe
from sparsegrad_cli.recipe.schema import TrainSection

RANK = 2


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def three(seed: int = 100) -> list[dict[str, Tensor]]:
    return list(islice(batches(4, seed), 3))


def prepared(kind: str, model: nn.Module, *, data: bool = True) -> Any:
    """Prepare a classifier, and return the method."""
    settings = PeftSettings.model_validate(spelled_out("shira") | {"r": RANK, "mask_type": kind})
    method = settings.implementation()
    training = TrainingData(20, lambda: iter(three()), lambda inputs: model(**inputs).loss)
    method.prepare(model, targets_of(model), scope="head", training=training if data else None)
    return method


def mask_of(model: nn.Module, target: Target) -> Tensor:
    """Return where a prepared layer trains, (out, in) bool."""
    layer: Any = model.get_submodule(target.name)
    rows, columns = layer.shira_indices["default"].long()
    found = torch.zeros(target.out_features, target.in_features, dtype=torch.bool)
    found[rows, columns] = True
    return found


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return the sum of the gradients of the batches, by autograd on a model that trains whole."""
    model.eval()
    for inputs in three():
        model(**inputs).loss.backward()
    weights = {t.name: model.get_parameter(f"{t.name}.weight") for t in targets_of(model)}
    return {name: weight.grad for name, weight in weights.items() if weight.grad is not None}


@pytest.mark.parametrize("kind", ["wm", "grad", "snip"])
def test_the_largest_magnitudes_train(kind: str) -> None:
    plain, model = classifier("bert"), classifier("bert")
    grads = gradients(plain)
    prepared(kind, model)
    for target in targets_of(plain):
        weight = target.weight_OI(plain).detach()
        grad = grads[target.name]
        score = {"wm": weight, "grad": grad, "snip": weight * grad}[kind].abs()
        count = RANK * (target.out_features + target.in_features)
        least = score.flatten().topk(count).values[-1]
        assert torch.equal(mask_of(model, target), score >= least), target.name
    others = [p for name, p in model.named_parameters() if "shira" not in name and p.requires_grad]
    assert {id(p) for p in others} == {
        id(p) for p in model.get_submodule("classifier").parameters()
    }


@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (16, 16)])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_structured_mask_is_a_diagonal_and_rows(shape: tuple[int, int], rank: int) -> None:
    count = rank * sum(shape)
    mask = struct_mask(torch.randn(shape), count)
    assert int(mask.sum()) == count and set(mask.unique().tolist()) == {0, 1}
    assert bool((mask.diagonal() == 1).all())
    full = (mask.sum(1) == shape[1]).sum()
    assert full >= (count - min(shape)) // shape[1]
    assert int(torch.linalg.matrix_rank(mask * torch.randn(shape))) == min(shape)


@pytest.mark.parametrize("kind", ["struct", "wm", "grad", "snip"])
def test_a_trained_adapter_is_loaded_without_data(kind: str) -> None:
    model = classifier("bert")
    method = prepared(kind, model)
    before = logits(model)
    optimizer = method.optimizer(model, TrainSection(learning_rate=0.1))
    for seed in range(3):
        optimizer.zero_grad()
        model.train()(**batch(seed=seed)).loss.backward()
        optimizer.step()
    trained = logits(model)
    assert not torch.allclose(trained, before, atol=1e-3)
    fresh = classifier("bert")
    loaded = prepared(kind, fresh, data=False)
    loaded.load_adapter(fresh, method.adapter_tensors(model))
    assert torch.equal(logits(fresh), trained)
    target = targets_of(classifier("bert"))[0]
    assert torch.equal(mask_of(fresh, target), mask_of(model, target))
    changed = loaded.merged_OI(fresh, target) - target.weight_OI(classifier("bert")).double()
    assert set((changed != 0).nonzero().T[0].tolist()) <= set(range(target.out_features))
    assert not bool(((changed.abs() > 0) & ~mask_of(fresh, target)).any())


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (("method.mask_type=top",), "expected random, struct, wm, grad, snip, got 'top'"),
        (("method.mask_type=wm", "method.random_seed=3"), "mask_type wm draws nothing"),
    ],
)
def test_settings_that_do_not_fit_are_refused(keys: tuple[str, ...], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(None, ("method=shira", *keys))
    problem = caught.value.problems[0]
    assert said in f"{problem.what} {problem.fix}"


def test_masks_from_gradients_take_calibration_settings() -> None:
    recipe = load_recipe(None, ("method=shira", "method.mask_type=snip", "calibration.steps=3"))
    assert recipe.recipe.method.reads_batches and recipe.recipe.calibration.steps == 3
