"""Rectangular Maxvol: choose the rows of a matrix that represent all others.

Fonarev et al. 2016 (arXiv 1610.04850) choose the few items to ask a new user about. The volume of
a tall matrix A is sqrt(det A'A). Choosing the rows of largest volume is NP-hard; the algorithm is
greedy.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GAIN = 1.01
_SWAPS = 1000


def rect_maxvol(rows_MK: Tensor, count: int) -> Tensor:
    """Return the numbers of the rows chosen by Rectangular Maxvol.

    First K rows whose volume no exchange of one row raises by more than 1 %: with C = A B^-1, for B
    of the chosen rows, exchanging row j of B for row i of A multiplies the volume by |C_ij|. Then
    one row at a time: row i multiplies the volume by sqrt(1 + |C_i|^2), where C = A B^+.

    Args:
        rows_MK: A, (M, K) with M >= K, of rank K.
        count: Number of rows to choose, from K to M.

    Returns:
        (count,) int64, different numbers in the order in which they were chosen.

    Raises:
        ValueError: ``count`` is not between K and M, or the rank of A is below K.
    """
    a_MK = rows_MK.double()
    total, rank = a_MK.shape
    if not rank <= count <= total:
        raise ValueError(f"expected from {rank} to {total} rows to choose, got {count}")
    chosen, c_MK = _square(a_MK)
    norms_M = c_MK.square().sum(1)
    norms_M[chosen] = -torch.inf
    for _ in range(count - rank):
        best = int(norms_M.argmax())
        chosen.append(best)
        scale = 1 + norms_M[best]
        inner_M = c_MK @ c_MK[best]  # (M, k) @ (k,)
        # Of the pseudo-inverse with one row more: a column is added, the others shrink.
        shrunk_MK = c_MK - torch.outer(inner_M, c_MK[best]) / scale
        c_MK = torch.cat([shrunk_MK, (inner_M / scale).unsqueeze(1)], 1)
        norms_M -= inner_M.square() / scale
        norms_M[best] = -torch.inf
    return torch.tensor(chosen)


def _square(a_MK: Tensor) -> tuple[list[int], Tensor]:
    """Return K rows whose square matrix B has a large volume, and C = A B^-1, (M, K)."""
    rank = a_MK.shape[1]
    # The pivots of an LU decomposition are a good start.
    factors, pivots = torch.linalg.lu_factor(a_MK)
    order = list(range(a_MK.shape[0]))
    for row, pivot in enumerate(pivots.tolist()):
        order[row], order[pivot - 1] = order[pivot - 1], order[row]
    diagonal = factors.diagonal().abs()
    if float(diagonal.min()) <= torch.finfo(torch.float64).eps * float(diagonal.max()) * len(order):
        raise ValueError(f"the rank of the rows is below {rank}")
    chosen = order[:rank]
    # C B = A: (M, K) @ (K, K) = (M, K)
    c_MK = torch.linalg.solve(a_MK[chosen], a_MK, left=False)
    for _ in range(_SWAPS):
        row, column = divmod(int(c_MK.abs().argmax()), rank)
        gain = c_MK[row, column]
        if abs(gain) <= _GAIN:
            break
        chosen[column] = row
        difference_K = c_MK[row].clone()
        difference_K[column] -= 1
        c_MK = c_MK - torch.outer(c_MK[:, column] / gain, difference_K)
    return chosen, c_MK
