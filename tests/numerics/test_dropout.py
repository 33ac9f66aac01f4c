"""Dropout with cheap masks: rates, independence and gradients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sparsegrad_cli.numerics.dropout import CheapDropout, dropout_add_norm, keep_mask


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("p", [0.0, 1e-4, 0.1, 0.5, 0.9, 1.0])
def test_values_are_kept_at_the_rate(p: float) -> None:
    mask, factor = keep_mask((1000, 333), p)
    assert mask.shape == (1000, 333) and mask.dtype == torch.int8
    assert set(mask.unique().tolist()) <= {0, 1}
    deviation = (p * (1 - p) / mask.numel()) ** 0.5
    assert abs(float(mask.float().mean()) - (1 - p)) <= 5 * deviation + 2**-17
    if p < 1:
        assert factor == pytest.approx(1 / (1 - p), rel=2**-15 / (1 - p))


def test_neighbouring_values_are_independent() -> None:
    """Four values share a number of 64 bits."""
    mask, _ = keep_mask((200_000, 4), 0.5)
    correlation = torch.corrcoef(mask.T.double())
    assert float((correlation - torch.eye(4, dtype=torch.float64)).abs().max()) < 0.01


def test_masks_follow_from_the_seed() -> None:
    torch.manual_seed(5)
    first, _ = keep_mask((100,), 0.3)
    second, _ = keep_mask((100,), 0.3)
    torch.manual_seed(5)
    again, _ = keep_mask((100,), 0.3)
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_dropout_scales_what_it_keeps_and_its_gradient_alike() -> None:
    layer, x = CheapDropout(0.25), torch.ones(4000, requires_grad=True)
    out = layer(x)
    out.sum().backward()
    assert out.detach().unique().tolist() == pytest.approx([0, 4 / 3])
    assert torch.equal(x.grad, out.detach())  # type: ignore[arg-type]
    assert torch.equal(layer.eval()(x), x)


def norm_inputs() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, 3, 5), (2, 3, 5), (5,), (5,))
    return tuple(
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in shapes
    )


def test_the_norm_of_a_residual_sum_is_the_formula_without_dropout() -> None:
    x, residual, weight, bias = norm_inputs()
    total = x + residual
    centred = total - total.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias
    out = dropout_add_norm(x, residual, weight, bias, 1e-5)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_of_the_norm_are_those_of_finite_differences(dropout: float) -> None:
    def function(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        torch.manual_seed(2)
        return dropout_add_norm(x, residual, weight, bias, 1e-5, dropout)

    assert torch.autograd.gradcheck(function, norm_inputs())


def test_the_norm_uses_the_mask_of_the_seed() -> None:
    x, residual, weight, bias = norm_inputs()
    torch.manual_seed(2)
    mask, factor = keep_mask(x.shape, 0.4)
    expected = F.layer_norm(x * mask * factor + residual, (5,), weight, bias, 1e-5)
    torch.manual_seed(2)
    out = dropout_add_norm(x, residual, weight, bias, 1e-5, 0.4)
    torch.testing.assert_close(out, expected)


def test_a_sum_in_half_precision_is_normalized_in_single_precision() -> None:
    x = torch.randn(4, 8, dtype=torch.bfloat16, requires_grad=True)
    residual, weight, bias = torch.randn(4, 8), torch.ones(8), torch.zeros(8)
    out = dropout_add_norm(x, residual, weight, bias, 1e-5)
    expected = F.layer_norm(x.float() + residual, (8,))
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16
