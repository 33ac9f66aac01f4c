"""Random matrices that are drawn again from a key; tests of NOLA draw them in plain Python."""

from __future__ import annotations

import pytest
import torch

from sparsegrad_cli.numerics import random_matrices
from sparsegrad_cli.numerics.random_matrices import combination, uniform


def key(number: int) -> torch.Tensor:
    return torch.tensor(number, dtype=torch.int64)


def test_numbers_are_uniform_and_independent() -> None:
    one, other = (uniform(key(n), 0, 200_000, torch.float64) for n in (5, 6))
    assert float(one.min()) >= -1 and float(one.max()) < 1
    assert abs(float(one.mean())) < 0.01 and abs(float(one.var()) - 1 / 3) < 0.01
    for left, right in (
        (one[1:], one[:-1]),
        (one, other),
        (one, uniform(~key(5), 0, 200_000, torch.float64)),
    ):
        assert abs(float((left * right).mean())) < 0.01
    counts = torch.histc(one, 20, min=-1, max=1)
    assert float((counts - 10_000).abs().max()) < 500


def test_a_stretch_is_the_same_wherever_it_starts() -> None:
    whole = uniform(key(3), 0, 50, torch.float32)
    assert torch.equal(uniform(key(3), 20, 30, torch.float32), whole[20:])
    assert torch.equal(uniform(key(3), 0, 50, torch.float64).float(), whole)


def test_how_many_are_drawn_at_a_time_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    c = torch.linspace(-1, 1, 11, dtype=torch.float64, requires_grad=True)
    whole = combination(c, key(9), 4, 3)
    (gradient,) = torch.autograd.grad(whole.square().sum(), [c])
    monkeypatch.setattr(random_matrices, "_CHUNK", 30)  # two matrices
    parts = combination(c, key(9), 4, 3)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts.square().sum(), [c])[0], gradient)
    assert torch.autograd.gradcheck(lambda v: combination(v, key(9), 4, 3), [c])
