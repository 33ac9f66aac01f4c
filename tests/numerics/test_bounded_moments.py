"""Bounded optimizer state equals dense state below its limit and follows a rule at it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsegrad_cli.numerics.selective_adamw import AdamW, BoundedMoments, Moments, sparse_step
from sparsegrad_cli.numerics.supports import largest_entries

SIZE, COUNT, STEPS = 60, 7, 25
HYPER = AdamW(lr=0.1, weight_decay=0.01)


def gradients(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(6, 10, generator=generator) for _ in range(STEPS)]


def choose(grad: Tensor) -> Tensor:
    return largest_entries(grad, COUNT)


def test_state_below_the_limit_equals_dense_state() -> None:
    dense, compact = torch.ones(6, 10), torch.ones(6, 10)
    moments, rows = Moments.like(dense), BoundedMoments.empty(SIZE, compact)
    for grad in gradients():
        sparse_step(dense, grad, moments, HYPER, choose)
        sparse_step(compact, grad, rows, HYPER, choose)
        assert torch.equal(dense, compact)
    positions = rows.positions.long()
    assert positions.tolist() == moments.age.view(-1).nonzero().squeeze(1).tolist()
    assert torch.equal(rows.first, moments.first.view(-1)[positions])
    assert torch.equal(rows.second, moments.second.view(-1)[positions])
    assert torch.equal(rows.age, moments.age.view(-1)[positions])


@pytest.mark.parametrize("capacity", [COUNT, COUNT + 1, 2 * COUNT, SIZE - 1])
def test_state_at_the_limit_drops_the_longest_untouched(capacity: int) -> None:
    """Compare with a dictionary: position -> (first, second, age, last)."""
    parameter, expected = torch.ones(6, 10), torch.ones(SIZE, dtype=torch.float64)
    rows = BoundedMoments.empty(capacity, parameter)
    book: dict[int, list[float]] = {}
    for step, grad in enumerate(gradients(), start=1):
        chosen = sparse_step(parameter, grad, rows, HYPER, choose).tolist()
        others = sorted((entry[3], at) for at, entry in book.items() if at not in chosen)
        new = [at for at in chosen if at not in book]
        for _, at in others[: max(0, len(book) + len(new) - capacity)]:
            del book[at]
        for at in chosen:
            g = float(grad.view(-1)[at])
            first, second, age, _ = book.get(at, [0.0, 0.0, 0, 0])
            first, second, age = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g, age + 1
            book[at] = [first, second, age, step]
            size = (first / (1 - 0.9**age)) / ((second / (1 - 0.999**age)) ** 0.5 + 1e-8)
            expected[at] -= HYPER.lr * (size + HYPER.weight_decay * float(expected[at]))
        assert rows.positions.tolist() == sorted(book)
        assert rows.age.tolist() == [book[at][2] for at in sorted(book)]
    torch.testing.assert_close(parameter.view(-1).double(), expected, rtol=1e-4, atol=1e-5)


def test_more_entries_than_the_limit_are_refused() -> None:
    rows = BoundedMoments.empty(2, torch.zeros(4))
    with pytest.raises(ValueError, match="3 entries in one step, room for 2"):
        rows.places(torch.tensor([0, 1, 2]))


def test_dtypes() -> None:
    rows = BoundedMoments.empty(4, torch.zeros(4, dtype=torch.bfloat16))
    rows.places(torch.tensor([1, 3]))
    assert rows.first.dtype == rows.second.dtype == torch.float32
    assert rows.positions.dtype == rows.age.dtype == rows.last.dtype == torch.int32
    assert BoundedMoments.empty(4, torch.zeros(4, dtype=torch.float64)).first.dtype == torch.float64
