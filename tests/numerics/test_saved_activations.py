"""Dropout with byte masks and the memory-saving gate equal plain autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sparsegrad_cli.numerics.saved_activations import ByteDropout, gated


def run(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, the gradient of the sum of its squares, and the next random number."""
    torch.manual_seed(3)
    x = x.detach().requires_grad_()
    y = layer(x)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    return y.detach(), grad, torch.rand(1)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_dropout_equals_torch(p: float, dtype: torch.dtype, training: bool) -> None:
    x = torch.randn(37, 11, generator=torch.Generator().manual_seed(0)).to(dtype)
    plain, lean = nn.Dropout(p).train(training), ByteDropout(p).train(training)
    for expected, got in zip(run(plain, x), run(lean, x), strict=True):
        assert torch.equal(expected, got)
        assert expected.dtype == got.dtype


def test_dropout_without_gradient_saves_nothing() -> None:
    x = torch.ones(50)
    torch.manual_seed(0)
    expected = nn.Dropout(0.5)(x)
    torch.manual_seed(0)
    assert torch.equal(ByteDropout(0.5)(x), expected)


@pytest.mark.parametrize("kind", [nn.Dropout, ByteDropout])
def test_dropout_bytes_kept(kind: type[nn.Dropout]) -> None:
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.untyped_storage().nbytes())
        return tensor

    x = torch.ones(1000, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kind(0.1)(x).sum()
    assert sum(saved) == (1000 if kind is ByteDropout else 4000)


def test_dropout_gradients_in_float64() -> None:
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)

    def fixed(value: Tensor) -> Tensor:
        torch.manual_seed(1)
        out: Tensor = ByteDropout(0.3)(value)
        return out

    assert torch.autograd.gradcheck(fixed, (x,))


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.ReLU()])
def test_gate_and_gradients_equal_plain_autograd(activation: nn.Module) -> None:
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
def test_gate_gradients_in_float64(wanted: tuple[bool, bool]) -> None:
    generator = torch.Generator().manual_seed(1)
    gate, up = (
        torch.randn(3, 5, generator=generator, dtype=torch.float64).requires_grad_(wants)
        for wants in wanted
    )
    assert torch.autograd.gradcheck(lambda a, b: gated(a, b, nn.SiLU()), (gate, up))
