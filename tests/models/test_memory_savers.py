"""Keeping less changes no number."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.tiny_models import (
    ARCHITECTURES,
    BLOCKS,
    INNER,
    batch,
    classifier,
    one_thread,
    targets_of,
)
from torch import Tensor, nn

from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.models.memory_savers import (
    recompute_activations,
    use_byte_dropout,
    use_efficient_gated_mlps,
)
from sparsegrad_cli.models.targets import Target
from sparsegrad_cli.numerics.saved_activations import ByteDropout


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of all parameters, in training mode with dropout."""
    model.train()
    torch.manual_seed(11)
    model(**batch()).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("architecture", ["bert", "distilbert", "gpt2", "electra", "deberta-v3"])
def test_byte_masks_change_nothing(architecture: str) -> None:
    plain = classifier(architecture)
    lean = copy.deepcopy(plain)
    count = use_byte_dropout(lean)
    assert count == sum(isinstance(m, ByteDropout) for m in lean.modules()) > 0
    assert not any(type(m) is nn.Dropout for m in lean.modules())
    assert [n for n, _ in lean.named_modules()] == [n for n, _ in plain.named_modules()]
    expected, got = gradients(plain), gradients(lean)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


# OPT's blocks hold their MLP's layers themselves.
@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - {"opt", "t5"}))
def test_recomputing_changes_nothing_and_keeps_less(architecture: str) -> None:
    plain = classifier(architecture)
    lean = copy.deepcopy(plain)
    owners = recompute_activations(lean, targets_of(lean))
    assert len(owners) == len({t.block for t in targets_of(plain)})
    assert kept(lean) < kept(plain)
    expected, got = gradients(plain), gradients(lean)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    names = [n for n, _ in plain.named_parameters()]
    assert [n for n, _ in lean.named_parameters()] == names


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "gemma"])
def test_efficient_gated_mlps_change_nothing_and_save_less(architecture: str) -> None:
    plain = classifier(architecture)
    lean = copy.deepcopy(plain)
    assert use_efficient_gated_mlps(lean, targets_of(lean)) == BLOCKS
    assert kept(plain) - kept(lean) == BLOCKS * 4 * 8 * 6 * INNER  # batch x length x width
    expected, got = gradients(plain), gradients(lean)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_what_only_looks_like_a_gated_mlp_is_left_alone() -> None:
    assert use_efficient_gated_mlps(classifier("bert"), targets_of(classifier("bert"))) == 0
    model = classifier("llama")
    mlp = model.get_submodule("model.layers.1.mlp")
    plain = mlp.forward
    mlp.forward = lambda x: 2 * plain(x)
    assert use_efficient_gated_mlps(model, targets_of(model)) == BLOCKS - 1


def kept(model: nn.Module) -> int:
    """Bytes of distinct tensors that autograd saves in a forward pass."""
    storages: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch()).loss
    del loss
    return sum(storages.values())


def test_an_mlp_without_a_module_of_its_own_is_refused() -> None:
    model = classifier("opt")
    with pytest.raises(UsageError, match="not a module of its own"):
        recompute_activations(model, targets_of(model))


def test_nothing_is_changed_on_classes() -> None:
    lean, other = classifier(), classifier()
    recompute_activations(lean, targets_of(lean))
    use_byte_dropout(lean)
    assert "forward" not in vars(other.get_submodule("bert.encoder.layer.0.intermediate"))
    assert any(type(m) is nn.Dropout for m in other.modules())


class DroppingMLP(nn.Module):
    """A gated MLP that drops in training, by a function that no submodule shows."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(4, 9), nn.Linear(4, 9)
        self.down_proj, self.act_fn = nn.Linear(9, 4), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return nn.functional.dropout(out, 0.5, training=self.training)


@pytest.mark.parametrize("activation", ["dropout", "in place", "identity"])
def test_gates_that_are_not_quite_such_are_left_alone_or_right(activation: str) -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([DroppingMLP().eval()])
    mlp: Any = model.layers[0]
    targets = [
        Target(f"layers.0.{n}", n, 0, out, width, False)
        for n, out, width in (("gate_proj", 9, 4), ("up_proj", 9, 4), ("down_proj", 4, 9))
    ]
    if activation != "dropout":
        mlp.act_fn = nn.Identity() if activation == "identity" else nn.ReLU(inplace=True)
        mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
    before = mlp.training
    assert use_efficient_gated_mlps(model, targets) == (activation == "identity")
    assert mlp.training is before
    x = torch.ones(2, 4)
    expected = mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
    assert torch.equal(mlp(x), expected)
