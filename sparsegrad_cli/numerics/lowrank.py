"""The nearest matrix of a given rank."""

from __future__ import annotations

import torch
from torch import Tensor


def nearest_of_rank(matrix_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B (out, r) and A (r, in) whose product is nearest to a matrix in the Frobenius norm.

    That is its truncated singular value decomposition (Eckart and Young 1936), written as a
    projection: with U the leading eigenvectors of M M', B = U and A = U' M; or with V those of
    M' M, B = M V and A = V', on whichever side is narrow. The wide side is never decomposed.

    Args:
        matrix_OI: (out, in), float64: the eigenvalues are squares.
        rank: at least 1; more than the narrow side has gives all of that.
    """
    if matrix_OI.shape[0] <= matrix_OI.shape[1]:
        _, vectors = torch.linalg.eigh(matrix_OI @ matrix_OI.T)  # ascending
        u_OR = vectors.flip(1)[:, :rank]
        return u_OR, u_OR.T @ matrix_OI
    _, vectors = torch.linalg.eigh(matrix_OI.T @ matrix_OI)
    v_IR = vectors.flip(1)[:, :rank]
    return matrix_OI @ v_IR, v_IR.T
