"""Which module was the first: in a chain, in a parent's own arithmetic, in the loss."""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import batch, classifier
from torch import Tensor, nn

from sparsegrad_cli.errors import NonFiniteError
from sparsegrad_cli.models.nan_check import INPUTS, LOSS, check_weights, first_non_finite


class Overflows(nn.Module):
    """Between its two layers, a function that leaves the finite numbers behind."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second((self.first(x).square() + 2) * 3e38)
        return out


def named(model: nn.Module, x: Tensor | None = None) -> str | None:
    x = torch.ones(2, 3) if x is None else x
    return first_non_finite(model, lambda: model(x).sum())


def test_a_layer_whose_weight_is_infinite() -> None:
    for place in range(3):
        layers = [nn.Linear(3, 3) for _ in range(3)]
        model = nn.Sequential(*layers)
        assert named(model) is None
        with torch.no_grad():
            layers[place].weight[0, 1] = float("inf")
        assert named(model) == str(place)


def test_arithmetic_between_layers_is_the_parents() -> None:
    model = nn.Sequential(nn.Linear(3, 3), Overflows(), nn.Linear(3, 3))
    assert named(model) == "1"


def test_inputs_and_loss_have_names_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    assert named(model, torch.full((2, 3), float("nan"))) == INPUTS
    assert first_non_finite(model, lambda: model(torch.ones(2, 3)).sum() / 0) == LOSS


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama", "deberta-v3"])
def test_in_real_models_masks_of_minus_infinity_are_not_blamed(architecture: str) -> None:
    model = classifier(architecture)
    inputs = batch()
    assert first_non_finite(model, lambda: model(**inputs).loss) is None
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    chosen = layers[len(layers) // 2]
    parameter = model.get_submodule(chosen).weight
    assert isinstance(parameter, nn.Parameter)
    with torch.no_grad():
        parameter.fill_(float("nan"))
    assert first_non_finite(model, lambda: model(**inputs).loss) == chosen


def test_nothing_is_left_behind() -> None:
    model = classifier("bert").train()
    state = torch.get_rng_state()
    first_non_finite(model, lambda: model(**batch()).loss)
    assert torch.equal(torch.get_rng_state(), state)
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_weights_are_checked_where_they_train() -> None:
    model = classifier("bert")
    check_weights(model, 3)
    layer = model.get_submodule("bert.encoder.layer.1.output.dense")
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        layer.weight[2, 2] = float("-inf")
    with pytest.raises(NonFiniteError, match=r"after step 3.*layer\.1\.output\.dense\.weight"):
        check_weights(model, 3)
    layer.weight.requires_grad_(False)
    check_weights(model, 3)
