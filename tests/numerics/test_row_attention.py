"""Attention of rows without padding, against the formula and finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparsegrad_cli.numerics.row_attention import (
    RowGroup,
    padded_attention,
    row_attention,
    row_groups,
)

HEADS, SIZE = 3, 4
LENGTHS = [7, 7, 6, 3, 3, 3, 1]


def tokens(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, HEADS, SIZE, generator=generator, dtype=torch.float64)


def formula(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None, first: bool = False
) -> Tensor:
    """Row by row and head by head, as the module's docstring says."""
    found = []
    start = 0
    for row, length in enumerate(LENGTHS):
        part = slice(start, start + length)
        asking = slice(row, row + 1) if first else part
        heads = []
        for head in range(HEADS):
            scores = scale * q[asking, head] @ k[part, head].T
            if bias is not None:
                scores = scores + bias[head, : len(scores), :length]
            weights = scores.exp() / scores.exp().sum(1, keepdim=True)
            heads.append(weights @ v[part, head])
        found.append(torch.stack(heads, 1))
        start += length
    return torch.cat(found)


def inputs(*, first: bool = False) -> list[Tensor]:
    asking = len(LENGTHS) if first else sum(LENGTHS)
    return [
        tokens(count, seed).requires_grad_()
        for seed, count in enumerate((asking, sum(LENGTHS), sum(LENGTHS)))
    ]


def bias_of(length: int) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randn(HEADS, length, length, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("attend", [row_attention, padded_attention])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_values_and_gradients_are_those_of_the_formula(
    attend: Callable[..., Tensor], biased: bool, first: bool
) -> None:
    ours, theirs = inputs(first=first), inputs(first=first)
    our_bias, their_bias = bias_of(7).requires_grad_(), bias_of(7).requires_grad_()
    out = attend(
        *ours,
        row_groups(LENGTHS),
        scale=0.7,
        bias_HLL=our_bias if biased else None,
        first_only=first,
    )
    q, k, v = theirs
    expected = formula(q, k, v, 0.7, their_bias if biased else None, first)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    weights = tokens(len(out), 5)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    pairs = [*zip(ours, theirs, strict=True), *([(our_bias, their_bias)] if biased else [])]
    for our, their in pairs:
        assert their.grad is not None
        torch.testing.assert_close(our.grad, their.grad, rtol=1e-9, atol=1e-12)


def test_gradients_with_dropout_are_those_of_finite_differences() -> None:
    """The same seed draws the same masks."""
    groups = row_groups([3, 2, 2])

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        torch.manual_seed(3)
        return row_attention(q, k, v, groups, scale=0.5, dropout=0.4, bias_HLL=bias)

    values = [tokens(7, seed).requires_grad_() for seed in range(3)]
    with torch.random.fork_rng(devices=[]):
        assert torch.autograd.gradcheck(attend, (*values, bias_of(3).requires_grad_()))


def test_dropout_drops_weights_at_its_rate_and_keeps_the_mean() -> None:
    q, k, _ = inputs()
    v = torch.ones_like(k)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        outs = torch.stack(
            [
                row_attention(q, k, v, row_groups(LENGTHS), scale=0.0, dropout=0.3)
                for _ in range(400)
            ]
        ).detach()
    # Without dropout each is 1. The variance of a row's sum of n weights is p / (1 - p) / n.
    assert abs(float(outs.mean()) - 1) < 0.01
    variance = outs[:, :7, :, 0].var(0).mean()
    assert abs(float(variance) - 0.3 / 0.7 / 7) < 0.006


def test_what_is_saved_is_queries_keys_values_and_a_byte_per_weight() -> None:
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor.detach()

    q, k, v = inputs()
    groups = row_groups(LENGTHS)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        row_attention(q, k, v, groups, scale=1.0, dropout=0.1)
    masks = [tensor for tensor in saved if tensor.dtype == torch.int8]
    others = [tensor for tensor in saved if tensor.dtype != torch.int8]
    weights = sum(group.size * HEADS * group.length**2 for group in groups)
    assert sum(mask.numel() * mask.element_size() for mask in masks) == weights
    assert {tensor.data_ptr() for tensor in others} == {x.data_ptr() for x in (q, k, v)}


def test_groups_hold_all_rows_in_order() -> None:
    for lengths in (LENGTHS, [1], [128] * 9, list(range(60, 0, -1)), [512, 511, 2, 1, 1]):
        groups = row_groups(lengths)
        row = token = 0
        for group in groups:
            part = lengths[row : row + group.size]
            assert group.rows == slice(row, row + group.size)
            assert group.tokens == slice(token, token + sum(part))
            assert group.length == part[0]
            assert (group.there is None) == (part[-1] == part[0])
            if group.there is not None:
                assert group.there.sum(1).tolist() == part
                assert group.gathered is not None and group.real is not None
                assert group.gathered[group.real].tolist() == list(range(token, token + sum(part)))
            row, token = row + group.size, token + sum(part)
        assert row == len(lengths)


def test_rows_of_like_length_share_a_group_and_long_rows_do_not() -> None:
    assert [group.size for group in row_groups([9, 9, 8, 8, 7])] == [5]
    assert [group.size for group in row_groups([200, 40, 40])] == [1, 2]
    # A group's scores are bounded, because they are in memory at a time.
    assert max(group.size * group.length**2 for group in row_groups([128] * 32)) == 4 * 128**2
    assert [group.size for group in row_groups([512, 512])] == [1, 1]


def test_half_precision_products_have_a_softmax_in_single_precision() -> None:
    q, k, v = (x.detach().to(torch.bfloat16) for x in inputs())
    out = row_attention(q, k, v, row_groups(LENGTHS), scale=1 / math.sqrt(SIZE))
    expected = formula(q.double(), k.double(), v.double(), 1 / math.sqrt(SIZE))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected, rtol=0.02, atol=0.02)


def test_rows_do_not_see_each_other() -> None:
    q, k, v = inputs()
    groups: list[RowGroup] = row_groups(LENGTHS)
    out = row_attention(q, k, v, groups, scale=1.0)
    (gradient,) = torch.autograd.grad(out[:7].sum(), v)
    assert bool((gradient[:7] != 0).all()) and not bool(gradient[7:].any())
