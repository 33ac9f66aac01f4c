"""The rotation of weights and gradients into a basis and back.

Row convention of torch: y = x W' + b with x (N, in), W (out, in), g = dL/dy (N, out),
G = dL/dW = g' x (out, in). In a basis (Q_out, Q_in):

    core            C       = Q_out' W Q_in            (out, in) at full rank
    core gradient   dL/dC   = Q_out' G Q_in = (g Q_out)' (x Q_in)
    output          y       = ((x Q_in) C') Q_out' + b

The last line is the paper's layer (section 3.2, *rotated* here). The code published with the paper
multiplies x by Q_in' instead; the function stays the same, so nothing fails, but the input side
then brings no sparsity.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsegrad_cli.numerics.hosvd import Basis


def to_core(matrix_OI: Tensor, basis: Basis) -> Tensor:
    """Return Q_out' M Q_in: (r_out, out) @ (out, in) @ (in, r_in) -> (r_out, r_in)."""
    if matrix_OI.shape[0] <= matrix_OI.shape[1]:
        return (basis.q_out.T @ matrix_OI) @ basis.q_in
    return basis.q_out.T @ (matrix_OI @ basis.q_in)


def from_core(core_RS: Tensor, basis: Basis) -> Tensor:
    """Return Q_out C Q_in': (out, r_out) @ (r_out, r_in) @ (r_in, in) -> (out, in)."""
    if basis.q_out.shape[0] >= basis.q_in.shape[0]:
        return basis.q_out @ (core_RS @ basis.q_in.T)
    return (basis.q_out @ core_RS) @ basis.q_in.T


def from_sparse_core(indices: Tensor, values: Tensor, basis: Basis) -> Tensor:
    """Return Q_out C Q_in' for a core with few entries, with one dense product instead of two.

    Args:
        indices: (k,) int64, flat positions in the (r_out, r_in) core.
        values: (k,) the entries there.
        basis: any rank.

    Returns:
        (out, in). The sparse factor meets the *wider* side first (k x wide multiplications), so
        that the one dense product left is the narrow one: at 1536 x 384 a fifth of the dense cost.
    """
    r_out, r_in = basis.q_out.shape[1], basis.q_in.shape[1]
    rows, columns = indices // r_in, indices % r_in
    if r_out >= r_in:
        # core' as (r_in, r_out), sparse, times Q_out' (r_out, out) -> (r_in, out)
        sparse = _sparse(columns, rows, values, (r_in, r_out))
        half: Tensor = torch.sparse.mm(sparse, basis.q_out.T)
        return half.T @ basis.q_in.T  # (out, r_in) @ (r_in, in)
    sparse = _sparse(rows, columns, values, (r_out, r_in))
    half = torch.sparse.mm(sparse, basis.q_in.T)  # (r_out, r_in) @ (r_in, in)
    return basis.q_out @ half  # (out, r_out) @ (r_out, in)


def _sparse(rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    return torch.sparse_coo_tensor(
        torch.stack((rows, columns)), values, shape, check_invariants=False
    )


def rotated_linear(x_NI: Tensor, core_OI: Tensor, bias_O: Tensor | None, basis: Basis) -> Tensor:
    """Return the output of the paper's layer: ((x Q_in) C') Q_out' + b.

    Shapes: (N, in) @ (in, r_in) @ (r_in, r_out) @ (r_out, out) -> (N, out). Autograd gives
    dL/dC = (g Q_out)' (x Q_in), which keeps only x Q_in, and dL/db as the plain column sum of g:
    a bias is no matrix and is never rotated.
    """
    u_NS = x_NI @ basis.q_in.to(x_NI.dtype)
    v_NR = F.linear(u_NS, core_OI)
    return F.linear(v_NR, basis.q_out.to(x_NI.dtype), bias_O)
