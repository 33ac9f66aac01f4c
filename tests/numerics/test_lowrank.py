"""The nearest low-rank matrix equals the truncated SVD of torch."""

from __future__ import annotations

import pytest
import torch

from sparsegrad_cli.numerics.lowrank import nearest_of_rank


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
