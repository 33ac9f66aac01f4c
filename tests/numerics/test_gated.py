"""The memory-saving gate equals plain autograd."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsegrad_cli.numerics.saved_activations import gated


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.ReLU()])
def test_values_and_gradients_equal_plain_autograd(activation: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    gate, up, weight = (torch.randn(4, 9, generator=generator) for _ in range(3))
    results = []
    for lean in (False, True):
        a, b = gate.clone().requires_grad_(), up.clone().requires_grad_()
        out = gated(a, b, activation) if lean else activation(a) * b
        (out * weight).sum().backward()
        results.append((out.detach(), a.grad, b.grad))
    for expected, got in zip(*results, strict=True):
        assert expected is not None and got is not None
        assert torch.equal(expected, got)


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_gradients_in_float64(wanted: tuple[bool, bool]) -> None:
    generator = torch.Generator().manual_seed(1)
    gate, up = (
        torch.randn(3, 5, generator=generator, dtype=torch.float64).requires_grad_(wants)
        for wants in wanted
    )
    assert torch.autograd.gradcheck(lambda a, b: gated(a, b, nn.SiLU()), (gate, up))
