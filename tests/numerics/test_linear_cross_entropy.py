"""Linear cross-entropy in blocks equals the loss of torch; memory that it saves."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsegrad_cli.memory.meter import MemoryMeter
from sparsegrad_cli.numerics.linear_cross_entropy import (
    block_rows,
    linear_cross_entropy,
    linear_cross_entropy_sums,
)

N, V, I = 13, 29, 5  # noqa: E741


def operands(
    dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return hidden, weight, bias and target."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, I, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(V, I, generator=generator, dtype=torch.float64).to(dtype)
    bias = torch.randn(V, generator=generator, dtype=torch.float64).to(dtype)
    return hidden, weight, bias, torch.randint(0, V, (N,), generator=generator)


def plain(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, cap: float | None
) -> Tensor:
    """Compute the loss from all logits."""
    z = scale * F.linear(hidden, weight, bias)
    return z if cap is None else cap * torch.tanh(z / cap)


def with_gradients(loss: Any, *tensors: Tensor | None) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() if t is not None else None for t in tensors]
    value = loss(*leaves)
    given = [leaf for leaf in leaves if leaf is not None]
    return [value.detach(), *torch.autograd.grad(3 * value, given)]


@pytest.mark.parametrize("rows", [1, 4, 13, 100])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.25, None), (1.0, 2.0), (1.5, 3.0)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_value_and_gradients(
    rows: int,
    with_bias: bool,
    scale: float,
    cap: float | None,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    hidden, weight, bias, target = operands(dtype)
    given = bias if with_bias else None

    def ours(h: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return linear_cross_entropy(h, w, target, bias_V=b, scale=scale, cap=cap, rows=rows)

    def theirs(h: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return F.cross_entropy(plain(h, w, b, scale, cap), target, reduction="sum")

    found = with_gradients(ours, hidden, weight, given)
    expected = with_gradients(theirs, hidden, weight, given)
    assert len(found) == (4 if with_bias else 3)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_sums(rows: int) -> None:
    hidden, weight, bias, target = operands()
    z = plain(hidden, weight, bias, 0.5, 2.0)
    target[:5] = z[:5].argmax(1)
    loss, correct = linear_cross_entropy_sums(
        hidden, weight, target, bias_V=bias, scale=0.5, cap=2.0, rows=rows
    )
    torch.testing.assert_close(loss, F.cross_entropy(z, target, reduction="sum"))
    assert int(correct) == int((z.argmax(1) == target).sum()) >= 5


def test_no_rows_give_no_loss() -> None:
    hidden, weight, _, target = operands()
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden[:0], weight, target[:0])
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None and not hidden.grad.any()


def test_confident_head_with_underflow() -> None:
    hidden, weight, _, target = operands(torch.float32)
    hidden = (hidden * 1e4).requires_grad_()
    loss = linear_cross_entropy(hidden, weight, target)
    loss.backward()
    z = hidden.detach().double() @ weight.double().T
    torch.testing.assert_close(
        loss.double(), F.cross_entropy(z, target, reduction="sum"), rtol=1e-5, atol=0
    )
    assert hidden.grad is not None and hidden.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sum_is_exact(dtype: torch.dtype) -> None:
    """The sum of 40,000 tokens exceeds float16, and bfloat16 would add in steps of 512."""
    tokens, vocabulary = 40_000, 50
    hidden = torch.zeros(tokens, 4, dtype=dtype)
    weight = torch.zeros(vocabulary, 4, dtype=dtype)
    loss = linear_cross_entropy(hidden, weight, torch.zeros(tokens, dtype=torch.int64))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(tokens * math.log(vocabulary), rel=1e-5)


def test_loss_scale_beyond_float16() -> None:
    hidden, weight, _, target = operands(torch.float16)
    hidden.requires_grad_()
    (scaled,) = torch.autograd.grad(
        linear_cross_entropy(hidden, weight, target) / 4 * 2.0**17, hidden
    )
    (alone,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, target), hidden)
    torch.testing.assert_close(scaled, alone * 2.0**15, rtol=1e-3, atol=0)


def test_only_trainable_operands_get_a_gradient() -> None:
    hidden, weight, bias, target = operands()
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, target, bias_V=bias)
    assert [t.shape for t in loss.grad_fn.saved_tensors if t is not None] == [(N, I)]  # type: ignore[union-attr]
    loss.backward()
    with pytest.raises(RuntimeError):
        loss.backward()
    with torch.no_grad():
        assert linear_cross_entropy(hidden, weight, target).grad_fn is None


def test_block_rows_follow_the_byte_limit() -> None:
    assert block_rows(32_768, torch.device("cpu")) == 128
    assert block_rows(32_768, torch.device("cuda")) == 512
    assert block_rows(10_000_000, torch.device("cpu")) == 16


def test_peak_memory_is_one_block() -> None:
    """For 512 x 8,192 logits (16 MiB): twice that plain, 1/28 of it in blocks of 16 rows."""
    tokens, vocabulary, width = 512, 8192, 8
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(vocabulary, width)
    target = torch.randint(0, vocabulary, (tokens,))
    whole = tokens * vocabulary * 4

    def peak(loss: Any) -> int:
        meter = MemoryMeter()
        meter.watch(nn.Module(), bases=(hidden, weight, target))
        before = sum(meter.live().values())
        with meter.phase("backward"):
            torch.autograd.grad(loss(), hidden)
        found = meter.peak("backward")
        assert found is not None
        return found.peak_bytes - before

    assert peak(lambda: F.cross_entropy(hidden @ weight.T, target, reduction="sum")) >= 2 * whole
    assert peak(lambda: linear_cross_entropy(hidden, weight, target, rows=16)) <= whole / 28
    with torch.no_grad():
        meter = MemoryMeter()
        with meter.phase("evaluate"):
            linear_cross_entropy_sums(hidden, weight, target, rows=16)
        found = meter.peak("evaluate")
    assert found is not None and found.categories["other"] <= whole / 28 + weight.nbytes
