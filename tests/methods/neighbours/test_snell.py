"""SNELL against its formula in float64, entry by entry, with gradients by hand."""

from __future__ import annotations

import math

import pytest
import torch
from support.one_layer import OneLayer, Parameters, check_steps, drawn
from torch import Tensor

from sparsegrad_cli.methods.neighbours.adaptive_settings import SnellSettings
from sparsegrad_cli.methods.neighbours.snell import competed, piecewise_kernel

SPARSITY = 0.4
SETTINGS = SnellSettings(name="snell", rank=3, sparsity=SPARSITY)
PIECES = (slice(0, 2), slice(2, 3))  # ceil(3 p / 2) for p = 0, 1, 2


def kernel(p: Parameters) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return K, and for each piece the distances and the differences of the rows."""
    differences = [p["b"][:, None, here] - p["a"][None, :, here] for here in PIECES]
    lengths = [d.square().sum(-1).sqrt() for d in differences]
    k_OI = p["alpha"][0] * lengths[0] + p["alpha"][1] * lengths[1]
    return k_OI, lengths, differences


def threshold(k_OI: Tensor) -> float:
    """Return the smallest |K| but for ceil(s m n) - 1 others."""
    sizes: list[float] = sorted(k_OI.abs().flatten().tolist())
    return sizes[math.ceil(SPARSITY * len(sizes)) - 1]


def delta_OI(p: Parameters) -> Tensor:
    k_OI = kernel(p)[0]
    t = threshold(k_OI)
    entries = [k * max(abs(k) - t, 0.0) for k in k_OI.flatten().tolist()]
    return torch.tensor(entries, dtype=torch.float64).view(k_OI.shape)


def pull(p: Parameters, g_OI: Tensor) -> Parameters:
    k_OI, lengths, differences = kernel(p)
    t = threshold(k_OI)
    dk_OI = g_OI * torch.where(k_OI.abs() > t, 2 * k_OI.abs() - t, 0.0)
    found = {"b": torch.zeros_like(p["b"]), "a": torch.zeros_like(p["a"])}
    for n, here in enumerate(PIECES):
        pulled = (p["alpha"][n] * dk_OI / lengths[n])[..., None] * differences[n]
        found["b"][:, here], found["a"][:, here] = pulled.sum(1), -pulled.sum(0)
    found["alpha"] = torch.stack([(dk_OI * length).sum() for length in lengths])
    return found


def test_steps_are_those_of_the_formula() -> None:
    one = OneLayer(SETTINGS)
    assert one.start["alpha"].tolist() == pytest.approx([0.1, -0.1])
    check_steps(one, delta_OI, pull)


@pytest.mark.parametrize("sparsity", [0.0, 0.4, 0.9])
def test_the_share_of_zeros_is_the_sparsity(sparsity: float) -> None:
    one = OneLayer(SnellSettings(name="snell", rank=4, sparsity=sparsity))
    one.steps(2)
    zeros = int((one.layer.change.delta_OI() == 0).sum())
    assert zeros == math.ceil(sparsity * 30)


def test_the_change_has_a_higher_rank_than_the_factors() -> None:
    b_OR, a_IR = drawn(12, 2, seed=1), drawn(10, 2, seed=2)
    kernel_OI = piecewise_kernel(b_OR, a_IR, torch.tensor([0.1, -0.1], dtype=torch.float64))
    assert torch.linalg.matrix_rank(kernel_OI) == 10


def test_gradients_are_those_of_finite_differences_while_the_threshold_holds() -> None:
    b_OR, a_IR = drawn(4, 3, seed=1).requires_grad_(), drawn(5, 3, seed=2).requires_grad_()
    alpha = torch.tensor([0.7, -0.4], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(piecewise_kernel, (b_OR, a_IR, alpha))
    kernel_OI = piecewise_kernel(b_OR, a_IR, alpha).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda k: competed(k, 0), (kernel_OI,))


def test_equal_rows_have_a_distance_whose_gradient_is_zero() -> None:
    rows = drawn(3, 2, seed=1).requires_grad_()
    piecewise_kernel(rows, rows.detach().clone(), torch.ones(2, dtype=torch.float64))[
        torch.arange(3), torch.arange(3)
    ].sum().backward()
    assert rows.grad is not None and not rows.grad.any()
