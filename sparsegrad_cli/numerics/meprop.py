"""MeProp, rows (Sun et al. 2017, equations 3-6): back-propagation through the top-k of dL/dy.

Forward is the plain layer. Backward keeps, for each example (row of g = dL/dy), its k largest
entries by magnitude and zeroes the rest; both products use the sparse g:

    dL/dW = g~' x   (out, N) @ (N, in)      dL/dx = g~ W   (N, out) @ (out, in)

*unified*: one choice of k columns for the whole batch, by the column sums of |g|, so that both
products shrink to k rows of W (Sun et al. 2017, section 3.2, "unified top-k").
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class _MepropLinear(torch.autograd.Function):
    """y = x W' + b with a sparsified backward pass; x (N, in), W (out, in), b (out,)."""

    @staticmethod
    def forward(
        ctx: Any, x_NI: Tensor, w_OI: Tensor, bias_O: Tensor | None, k: int, unified: bool
    ) -> Tensor:
        ctx.save_for_backward(x_NI if w_OI.requires_grad else None, w_OI)
        ctx.k, ctx.unified = k, unified
        return F.linear(x_NI, w_OI, bias_O)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g_NO,) = grads
        x_NI, w_OI = ctx.saved_tensors
        wants_x, wants_w, wants_b = ctx.needs_input_grad[:3]
        dx = dw = None
        # Under autocast g arrives in half precision while W is float32: products run in g's dtype.
        # The bias gradient is the plain column sum of g: it is no matrix product and saves nothing.
        db = g_NO.sum(0) if wants_b else None
        if ctx.unified:
            rows = torch.topk(g_NO.abs().sum(0), ctx.k, sorted=False).indices.sort().values
            g_NK = g_NO[:, rows]
            if wants_x:
                dx = g_NK @ w_OI[rows].to(g_NK.dtype)  # (N, k) @ (k, in)
            if wants_w:
                dw = torch.zeros_like(w_OI)
                dw[rows] = (g_NK.T @ x_NI.to(g_NK.dtype)).to(dw.dtype)  # (k, N) @ (N, in)
            return dx, dw, db, None, None
        g_NO = keep_largest_per_row(g_NO, ctx.k)
        if wants_x:
            dx = g_NO @ w_OI.to(g_NO.dtype)  # (N, out) @ (out, in)
        if wants_w:
            dw = (g_NO.T @ x_NI.to(g_NO.dtype)).to(w_OI.dtype)  # (out, N) @ (N, in)
        return dx, dw, db, None, None


def keep_largest_per_row(g_NO: Tensor, k: int) -> Tensor:
    """Return g with all but the k largest magnitudes of each row set to 0: exactly k, with ties."""
    indices = torch.topk(g_NO.abs(), k, dim=1, sorted=False).indices
    return torch.zeros_like(g_NO).scatter_(1, indices, g_NO.gather(1, indices))


def meprop_linear(
    x: Tensor, w_OI: Tensor, bias_O: Tensor | None, *, k: int, unified: bool = False
) -> Tensor:
    """Apply a linear layer whose backward pass keeps k entries of dL/dy per example or batch.

    Args:
        x: (..., in); w_OI: (out, in); bias_O: (out,) or None.
        k: 1 to out.
        unified: one choice for the whole batch.

    Raises:
        ValueError: k is out of range.
    """
    if not 1 <= k <= w_OI.shape[0]:
        raise ValueError(f"cannot keep {k} of {w_OI.shape[0]} outputs")
    flat = x.reshape(-1, x.shape[-1])
    y_NO: Tensor = _MepropLinear.apply(flat, w_OI, bias_O, k, unified)
    return y_NO.reshape(*x.shape[:-1], w_OI.shape[0])
