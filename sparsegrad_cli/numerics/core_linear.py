"""The core form of SparseGrad: y = x W' + b + ((x Q_in) S') Q_out', with W frozen.

S (r_out, r_in) is zero at the start, so the layer starts as the plain one; training changes S
alone. At full rank, with S = C - Q_out' W Q_in, this is the paper's layer (section 3.2) written as
a difference. Its cost differs: the backward pass needs u = x Q_in (N, r_in) and never x.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def materializing_pays(
    tokens: int, out_features: int, in_features: int, r_out: int, r_in: int
) -> bool:
    """Return whether building W + Q_out S Q_in' costs fewer multiplications than the side path.

    The side path multiplies every token by S and Q_out forward, and by S and Q_in backward. The
    built weight is made twice, forward and backward, so that it need not be kept between them.
    u = x Q_in and h = g Q_out are needed for dL/dS either way.
    """
    side = tokens * (2 * r_out * r_in + r_out * out_features + r_in * in_features)
    built = 2 * (out_features * r_out * r_in + out_features * r_in * in_features)
    return built < side


def effective_weight(
    weight_OI: Tensor, core_RS: Tensor, q_out_OR: Tensor, q_in_IS: Tensor
) -> Tensor:
    """Return W + Q_out S Q_in': (out, r_out) @ (r_out, r_in) @ (r_in, in) added to (out, in)."""
    return torch.addmm(weight_OI, q_out_OR @ core_RS, q_in_IS.T)


def product_dtype(x: Tensor, plain: torch.dtype) -> torch.dtype:
    """Return the dtype of products with x: autocast's under autocast, else ``plain``."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else plain


class _CoreLinear(torch.autograd.Function):
    """See :func:`core_linear`. All tensors but W of one dtype; x has two dimensions.

    W is kept as it is, and made of x's dtype where it is needed: a copy would live until backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_NI: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        core_RS: Tensor,
        q_out_OR: Tensor,
        q_in_IS: Tensor,
        materialize: bool,
    ) -> Tensor:
        frozen_OI = weight_OI
        weight_OI = weight_OI.to(x_NI.dtype)
        u_NS = x_NI @ q_in_IS  # (N, in) @ (in, r_in)
        if materialize:
            built_OI = effective_weight(weight_OI, core_RS, q_out_OR, q_in_IS)
            y_NO = F.linear(x_NI, built_OI, bias_O)  # (N, in) @ (in, out)
        else:
            y_NO = F.linear(x_NI, weight_OI, bias_O)  # (N, in) @ (in, out)
            # In place: the side path never holds a second (N, out).
            y_NO.addmm_(u_NS @ core_RS.T, q_out_OR.T)  # (N, r_out) @ (r_out, out)
        ctx.save_for_backward(u_NS, frozen_OI, core_RS, q_out_OR, q_in_IS)
        ctx.materialize = materialize
        return y_NO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (g_NO,) = grads
        u_NS, weight_OI, core_RS, q_out_OR, q_in_IS = ctx.saved_tensors
        needs_x, _, needs_bias, needs_core = ctx.needs_input_grad[:4]
        dx_NI = dbias_O = dcore_RS = h_NR = None
        if needs_x:
            weight_OI = weight_OI.to(g_NO.dtype)
        if needs_core or (needs_x and not ctx.materialize):
            h_NR = g_NO @ q_out_OR  # (N, out) @ (out, r_out)
        if needs_core:
            assert h_NR is not None
            dcore_RS = h_NR.T @ u_NS  # (r_out, N) @ (N, r_in)
        if needs_bias:
            dbias_O = g_NO.sum(0)  # a bias is never rotated
        if needs_x and ctx.materialize:
            # (N, out) @ (out, in)
            dx_NI = g_NO @ effective_weight(weight_OI, core_RS, q_out_OR, q_in_IS)
        elif needs_x:
            assert h_NR is not None
            dx_NI = g_NO @ weight_OI  # (N, out) @ (out, in)
            dx_NI.addmm_(h_NR @ core_RS, q_in_IS.T)  # (N, r_in) @ (r_in, in)
        return dx_NI, None, dbias_O, dcore_RS, None, None, None


def core_linear(
    x: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    core_RS: Tensor,
    q_out_OR: Tensor,
    q_in_IS: Tensor,
    *,
    materialize: bool | None = None,
) -> Tensor:
    """Return x W' + b + ((x Q_in) S') Q_out', saving only x Q_in for the backward pass.

    Args:
        x: (..., in). Under autocast all products are made in autocast's dtype, else in x's.
        weight_OI: (out, in), frozen: it gets no gradient.
        bias_O: (out,) or None.
        core_RS: S, (r_out, r_in); gets the gradient (g Q_out)' (x Q_in).
        q_out_OR, q_in_IS: (out, r_out) and (in, r_in), frozen.
        materialize: whether to build W + Q_out S Q_in' in either pass; by default where that costs
            fewer multiplications (:func:`materializing_pays`) and loses nothing: in half precision
            the increment would drown in the weight's rounding.

    Returns:
        (..., out).
    """
    dtype = product_dtype(x, x.dtype)
    flat_NI = x.reshape(-1, x.shape[-1]).to(dtype)
    if materialize is None:
        sides = (*weight_OI.shape, *core_RS.shape)
        exact = dtype in (torch.float32, torch.float64)
        materialize = exact and materializing_pays(flat_NI.shape[0], *sides)
    y_NO = _CoreLinear.apply(
        flat_NI,
        weight_OI,
        None if bias_O is None else bias_O.to(dtype),
        core_RS.to(dtype),
        q_out_OR.to(dtype),
        q_in_IS.to(dtype),
        materialize,
    )
    shaped: Tensor = y_NO.reshape(*x.shape[:-1], weight_OI.shape[0])
    return shaped
