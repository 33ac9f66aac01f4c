"""Rectangular Maxvol against determinants of all candidates."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from sparsegrad_cli.numerics.maxvol import rect_maxvol


def matrix(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, dtype=torch.float64, generator=generator)


def volume(rows: Tensor) -> float:
    """Return sqrt(det A'A)."""
    return float(torch.linalg.det(rows.T @ rows).clamp(min=0).sqrt())


@pytest.mark.parametrize("seed", range(5))
def test_no_exchange_of_one_row_raises_the_square_volume(seed: int) -> None:
    a = matrix(30, 4, seed)
    chosen = rect_maxvol(a, 4).tolist()
    best = volume(a[chosen])
    for place in range(4):
        for other in set(range(30)) - set(chosen):
            swapped = [*chosen[:place], other, *chosen[place + 1 :]]
            assert volume(a[swapped]) <= 1.0101 * best


@pytest.mark.parametrize("seed", range(5))
def test_every_further_row_is_the_one_that_raises_the_volume_most(seed: int) -> None:
    a = matrix(25, 3, seed)
    chosen = rect_maxvol(a, 9).tolist()
    assert len(set(chosen)) == 9
    for number in range(3, 9):
        so_far = chosen[:number]
        volumes = {i: volume(a[[*so_far, i]]) for i in set(range(25)) - set(so_far)}
        assert volumes[chosen[number]] == pytest.approx(max(volumes.values()), rel=1e-9)


def test_the_greedy_choice_is_near_the_best_of_all() -> None:
    a = matrix(12, 3, 0)
    best = max(volume(a[list(rows)]) for rows in combinations(range(12), 5))
    assert volume(a[rect_maxvol(a, 5)]) > 0.8 * best


def test_rows_that_stand_apart_are_chosen_among_copies() -> None:
    a = matrix(1, 3, 0).repeat(40, 1)
    a[[7, 19, 33]] += 3 * torch.eye(3, dtype=torch.float64)
    assert {7, 19, 33} <= set(rect_maxvol(a, 4).tolist())


def test_all_rows_and_lower_precision() -> None:
    assert sorted(rect_maxvol(matrix(6, 2, 1).float(), 6).tolist()) == list(range(6))


@pytest.mark.parametrize("count", [2, 8])
def test_a_count_out_of_range_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"expected from 3 to 7 rows to choose, got {count}"):
        rect_maxvol(matrix(7, 3, 0), count)


def test_dependent_columns_are_refused() -> None:
    a = matrix(9, 2, 0)
    with pytest.raises(ValueError, match="the rank of the rows is below 3"):
        rect_maxvol(torch.cat([a, a.sum(1, keepdim=True)], 1), 4)
