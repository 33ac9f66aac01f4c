"""Factors of a matrix: the nearest of a given rank, and exact ones of a sparse matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def nearest_of_rank(matrix_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return B (out, r) and A (r, in) whose product is nearest in the Frobenius norm.

    That is its truncated singular value decomposition (Eckart and Young 1936), written as a
    projection: with U the leading eigenvectors of M M', B = U and A = U' M; or with V those of
    M' M, B = M V and A = V', on whichever side is narrow. The wide side is never decomposed.

    Args:
        matrix_OI: (out, in), float64: the eigenvalues are squares.
        rank: at least 1; at most the narrow side is used.
    """
    if matrix_OI.shape[0] <= matrix_OI.shape[1]:
        _, vectors = torch.linalg.eigh(matrix_OI @ matrix_OI.T)  # ascending
        u_OR = vectors.flip(1)[:, :rank]
        return u_OR, u_OR.T @ matrix_OI
    _, vectors = torch.linalg.eigh(matrix_OI.T @ matrix_OI)
    v_IR = vectors.flip(1)[:, :rank]
    return matrix_OI @ v_IR, v_IR.T


def leading_singular_vectors(matrix_OI: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (out, r), S (r,) and V (in, r) of the largest singular values, in the same dtype.

    Args:
        matrix_OI: (out, in), float32 or float64.
        rank: at least 1; at most the narrow side is used.
    """
    u_OK, s_K, v_KI = torch.linalg.svd(matrix_OI, full_matrices=False)
    # Copies, for views would keep all vectors alive; row by row, as a loaded tensor lies.
    u_OR = u_OK[:, :rank].clone(memory_format=torch.contiguous_format)
    v_IR = v_KI[:rank].T.clone(memory_format=torch.contiguous_format)
    return u_OR, s_K[:rank].clone(), v_IR


def structural_factors(matrix_RS: Tensor, pattern_RS: Tensor) -> tuple[Tensor, Tensor]:
    """Return L (R, t) and M (t, S) with L M equal to a matrix, t the term rank of its pattern.

    The term rank is the most entries of the pattern of which no two share a row or column: no
    matrix with this pattern has a higher rank, and almost all have this one. By König's theorem
    t rows and columns hold the whole pattern (a minimum vertex cover). L holds unit vectors for
    those rows and copies of those columns, M the converse, so that nothing is rounded.

    Args:
        matrix_RS: (R, S), zero outside the pattern.
        pattern_RS: (R, S) bool. An empty one gives t = 1, of zeros.
    """
    rows, columns = _cover(pattern_RS.cpu())
    if len(rows) + len(columns) == 0:
        rows = torch.zeros(1, dtype=torch.int64)
    rows, columns = rows.to(matrix_RS.device), columns.to(matrix_RS.device)
    beside_RS = matrix_RS.index_fill(0, rows, 0.0)
    unit_R = torch.eye(matrix_RS.shape[0], dtype=matrix_RS.dtype, device=matrix_RS.device)
    unit_S = torch.eye(matrix_RS.shape[1], dtype=matrix_RS.dtype, device=matrix_RS.device)
    left = torch.cat((unit_R[:, rows], beside_RS[:, columns]), dim=1)
    right = torch.cat((matrix_RS[rows], unit_S[columns]), dim=0)
    return left, right


def _cover(pattern_RS: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest set of rows and columns that holds every entry of a pattern."""
    import numpy as np
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import maximum_bipartite_matching

    pattern = pattern_RS.numpy()
    # The column that each row is matched with, or -1.
    matched = maximum_bipartite_matching(csr_array(pattern), perm_type="column")
    row_of = np.full(pattern.shape[1], -1)
    row_of[matched[matched >= 0]] = np.flatnonzero(matched >= 0)
    # From unmatched rows along entries to columns, and back along the matching.
    seen_rows, seen_columns = matched < 0, np.zeros(pattern.shape[1], dtype=bool)
    front = seen_rows
    while front.any():
        columns = pattern[front].any(axis=0) & ~seen_columns
        seen_columns |= columns
        front = np.zeros_like(seen_rows)
        front[row_of[columns]] = True  # all of them are matched: the matching is maximal
        front &= ~seen_rows
        seen_rows |= front
    return (
        torch.from_numpy(np.flatnonzero(~seen_rows)),
        torch.from_numpy(np.flatnonzero(seen_columns)),
    )
