"""The nearest low-rank matrix, and exact factors of a sparse matrix."""

from __future__ import annotations

import itertools

import pytest
import torch

from sparsegrad_cli.numerics.lowrank import nearest_of_rank, structural_factors


@pytest.mark.parametrize("shape", [(6, 11), (11, 6), (7, 7)])
@pytest.mark.parametrize("rank", [1, 3, 6, 50])
def test_product_is_the_truncated_svd(shape: tuple[int, int], rank: int) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    b, a = nearest_of_rank(matrix, rank)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    kept = min(rank, min(shape))
    assert b.shape == (shape[0], kept) and a.shape == (kept, shape[1])
    torch.testing.assert_close(b @ a, (u[:, :kept] * s[:kept]) @ v[:kept], atol=1e-12, rtol=0)


def test_low_rank_matrix_is_unchanged() -> None:
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(9, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    for matrix in (left @ right.T, torch.zeros(9, 5, dtype=torch.float64)):
        b, a = nearest_of_rank(matrix, 2)
        torch.testing.assert_close(b @ a, matrix, atol=1e-12, rtol=0)


def sparse(rows: int, columns: int, entries: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.zeros(rows * columns, dtype=torch.float64)
    places = torch.randperm(rows * columns, generator=generator)[:entries]
    matrix[places] = torch.randn(entries, generator=generator, dtype=torch.float64)
    return matrix.view(rows, columns)


def term_rank(pattern: torch.Tensor) -> int:
    """Compute the term rank by its definition, over all assignments of columns to rows."""
    rows, columns = pattern.shape
    ways = itertools.permutations(range(max(rows, columns)), rows)
    return max(
        sum(bool(pattern[row, c]) for row, c in enumerate(way) if c < columns) for way in ways
    )


@pytest.mark.parametrize("entries", range(0, 21, 2))
@pytest.mark.parametrize(("rows", "columns"), [(5, 4), (4, 5), (5, 5)])
def test_factors_are_exact_and_have_the_term_rank(rows: int, columns: int, entries: int) -> None:
    matrix = sparse(rows, columns, min(entries, rows * columns), seed=entries)
    left, right = structural_factors(matrix, matrix != 0)
    assert torch.equal(left @ right, matrix)
    assert left.shape[1] == right.shape[0] == max(1, term_rank(matrix != 0))


@pytest.mark.parametrize(("rows", "columns", "entries"), [(64, 64, 120), (40, 90, 60), (90, 40, 9)])
def test_random_matrices_of_a_pattern_have_the_term_rank(
    rows: int, columns: int, entries: int
) -> None:
    matrix = sparse(rows, columns, entries, seed=1)
    left, right = structural_factors(matrix, matrix != 0)
    assert torch.equal(left @ right, matrix)
    assert left.shape[1] == int(torch.linalg.matrix_rank(matrix)) < min(rows, columns)


def test_rank_depends_on_the_pattern_only() -> None:
    """Two equal rows have rank 1, but their pattern allows rank 2."""
    matrix = torch.ones(2, 3, dtype=torch.float64)
    left, right = structural_factors(matrix, torch.ones(2, 3, dtype=torch.bool))
    assert left.shape[1] == 2 and torch.equal(left @ right, matrix)
    left, right = structural_factors(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool))
    assert left.shape[1] == 1 and not (left @ right).any()
