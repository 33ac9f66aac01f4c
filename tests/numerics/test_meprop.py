"""meProp: a plain forward pass, and a truncated backward pass computed by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsegrad_cli.numerics.meprop import keep_largest_per_row, meprop_linear

N, OUT, IN = 4, 6, 5


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (x, W, b, g); the first three require gradients."""
    x, w, b = normal(N, IN, seed=1), normal(OUT, IN, seed=2), normal(OUT, seed=3)
    return x.requires_grad_(), w.requires_grad_(), b.requires_grad_(), normal(N, OUT, seed=4)


def pruned_by_hand(g: Tensor, k: int, unified: bool) -> Tensor:
    """Zero all but the k largest |g| of each row (or column sum) in Python loops."""
    result = torch.zeros_like(g)
    sums = [sum(abs(float(g[n, o])) for n in range(len(g))) for o in range(g.shape[1])]
    for n in range(len(g)):
        sizes = sums if unified else [abs(float(v)) for v in g[n]]
        kept = sorted(range(g.shape[1]), key=lambda o: -sizes[o])[:k]
        for o in kept:
            result[n, o] = g[n, o]
    return result


@pytest.mark.parametrize("unified", [False, True])
def test_forward_is_the_plain_layer(unified: bool) -> None:
    x, w, b, _ = layer()
    y = meprop_linear(x, w, b, k=2, unified=unified)
    assert torch.equal(y, torch.nn.functional.linear(x, w, b))
    assert torch.equal(
        meprop_linear(x, w, None, k=2, unified=unified), torch.nn.functional.linear(x, w)
    )


@pytest.mark.parametrize("unified", [False, True])
@pytest.mark.parametrize("k", [1, 2, 5, 6])
def test_backward_by_hand(k: int, unified: bool) -> None:
    x, w, b, g = layer()
    meprop_linear(x, w, b, k=k, unified=unified).backward(g)
    kept = pruned_by_hand(g, k, unified)
    assert x.grad is not None and w.grad is not None and b.grad is not None
    torch.testing.assert_close(w.grad, kept.T @ x.detach(), atol=1e-12, rtol=0)
    torch.testing.assert_close(x.grad, kept @ w.detach(), atol=1e-12, rtol=0)
    # the bias uses all of g: its column sum is not a matrix product
    torch.testing.assert_close(b.grad, g.sum(0), atol=1e-12, rtol=0)


@pytest.mark.parametrize("unified", [False, True])
def test_keeping_all_outputs_is_the_dense_layer(unified: bool) -> None:
    x, w, b, _ = layer()
    assert torch.autograd.gradcheck(
        lambda x, w, b: meprop_linear(x, w, b, k=OUT, unified=unified), (x, w, b)
    )


def test_unified_touches_exactly_k_rows_of_the_weight() -> None:
    x, w, b, g = layer()
    meprop_linear(x, w, b, k=2, unified=True).backward(g)
    assert w.grad is not None
    assert int((w.grad != 0).any(dim=1).sum()) == 2


def test_per_example_choices_differ_and_their_union_may_exceed_k() -> None:
    x, w, b, _ = layer()
    g = torch.zeros(N, OUT, dtype=torch.float64)
    for n in range(N):
        g[n, n], g[n, 5] = 10.0, 1.0
    meprop_linear(x, w, b, k=1).backward(g)
    assert w.grad is not None
    assert (w.grad != 0).any(dim=1).tolist() == [True, True, True, True, False, False]


@pytest.mark.parametrize("k", [1, 3, 6])
def test_exactly_k_entries_per_row_under_ties(k: int) -> None:
    for g in (torch.ones(N, OUT), -torch.ones(N, OUT), torch.tensor([1.0, -1.0] * 3).repeat(N, 1)):
        kept = keep_largest_per_row(g, k)
        assert (kept != 0).sum(dim=1).tolist() == [k] * N


def test_largest_magnitudes_are_kept() -> None:
    g = torch.tensor([[1.0, -3.0, 2.0], [-0.1, 0.0, -0.2]])
    assert keep_largest_per_row(g, 1).tolist() == [
        [0.0, -3.0, 0.0],
        [0.0, 0.0, pytest.approx(-0.2)],
    ]


@pytest.mark.parametrize("unified", [False, True])
def test_leading_dimensions_and_a_transposed_weight(unified: bool) -> None:
    """GPT-2 stores the transposed weight (in, out); every token is an example."""
    x = normal(2, 3, IN, seed=1)
    stored = normal(IN, OUT, seed=2).requires_grad_()
    g = normal(2, 3, OUT, seed=4)
    meprop_linear(x, stored.T, None, k=2, unified=unified).backward(g)
    kept = pruned_by_hand(g.reshape(-1, OUT), 2, unified)
    assert stored.grad is not None
    torch.testing.assert_close(stored.grad, x.reshape(-1, IN).T @ kept, atol=1e-12, rtol=0)


@pytest.mark.parametrize("unified", [False, True])
def test_only_needed_gradients_are_computed(unified: bool) -> None:
    x, w, b, g = layer()
    frozen = w.detach()
    meprop_linear(x, frozen, b, k=2, unified=unified).backward(g)
    assert x.grad is not None and frozen.grad is None
    y = meprop_linear(x.detach(), w, None, k=2, unified=unified)
    y.backward(g)
    assert w.grad is not None


@pytest.mark.parametrize("k", [0, -1, OUT + 1])
def test_k_out_of_range_is_refused(k: int) -> None:
    x, w, b, _ = layer()
    with pytest.raises(ValueError, match=f"of {OUT} outputs"):
        meprop_linear(x, w, b, k=k)


@pytest.mark.parametrize("unified", [False, True])
def test_autocast_gradients_have_the_parameter_dtype(unified: bool) -> None:
    x, w, b, g = layer()
    x, w, b = (t.detach().float().requires_grad_() for t in (x, w, b))
    with torch.autocast("cpu", torch.bfloat16):
        y = meprop_linear(x, w, b, k=2, unified=unified)
        assert y.dtype == torch.bfloat16
    y.backward(g.to(torch.bfloat16))
    kept = pruned_by_hand(g.to(torch.bfloat16).double(), 2, unified).float()
    for tensor, expected in (
        (w, kept.T @ x.detach()),
        (x, kept @ w.detach()),
        (b, g.to(torch.bfloat16).float().sum(0)),
    ):
        assert tensor.grad is not None and tensor.grad.dtype == torch.float32
        torch.testing.assert_close(tensor.grad, expected, atol=0.1, rtol=0.03)
