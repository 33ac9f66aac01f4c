"""A frozen layer whose product another library makes, and a core beside it.

Where W is packed in a few bits, another library multiplies by it. This module only needs W as a
matrix while the backward pass makes one product.

    y  = x W' + b                                  nothing is saved: dx = g W
    y += ((x Q_in) S') Q_out'                      x Q_in is saved:  dx = ((g Q_out) S) Q_in'
                                                                    dS = (g Q_out)' (x Q_in)

The sum is :func:`sparsegrad_cli.numerics.core_linear.core_linear`, taken apart at the plus sign.
LoRA's adapter goes beside such a layer in the same way (:func:`adapter_linear`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sparsegrad_cli.numerics.core_linear import product_dtype


class _FrozenLinear(torch.autograd.Function):
    """See :func:`frozen_linear`. x has two dimensions."""

    @staticmethod
    def forward(
        ctx: Any, x_NI: Tensor, product: Callable[[Tensor], Tensor], weight: Callable[[], Tensor]
    ) -> Tensor:
        ctx.weight = weight
        return product(x_NI)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, None, None]:
        (g_NO,) = grads
        return g_NO @ ctx.weight().to(g_NO.dtype), None, None  # (N, out) @ (out, in)


class _CoreBeside(torch.autograd.Function):
    """See :func:`core_beside`. All tensors of one dtype; x and y have two dimensions."""

    @staticmethod
    def forward(
        ctx: Any, x_NI: Tensor, y_NO: Tensor, core_RS: Tensor, q_out_OR: Tensor, q_in_IS: Tensor
    ) -> Tensor:
        u_NS = x_NI @ q_in_IS  # (N, in) @ (in, r_in)
        # In place: the side path never holds a second (N, out).
        y_NO.addmm_(u_NS @ core_RS.T, q_out_OR.T)  # (N, r_out) @ (r_out, out)
        ctx.mark_dirty(y_NO)
        ctx.save_for_backward(u_NS, core_RS, q_out_OR, q_in_IS)
        return y_NO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (g_NO,) = grads
        u_NS, core_RS, q_out_OR, q_in_IS = ctx.saved_tensors
        needs_x, needs_y, needs_core = ctx.needs_input_grad[:3]
        h_NR = g_NO @ q_out_OR  # (N, out) @ (out, r_out)
        dx_NI = (h_NR @ core_RS) @ q_in_IS.T if needs_x else None  # (N, r_in) @ (r_in, in)
        dcore_RS = h_NR.T @ u_NS if needs_core else None  # (r_out, N) @ (N, r_in)
        return dx_NI, g_NO if needs_y else None, dcore_RS, None, None


class _AdapterLinear(torch.autograd.Function):
    """See :func:`adapter_linear`. x has two dimensions."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NI: Tensor,
        weight_OI: Tensor | None,
        bias_O: Tensor | None,
        a_RI: Tensor,
        b_OR: Tensor,
        product: Callable[[Tensor], Tensor] | None,
        unpacked: Callable[[], Tensor] | None,
        scaling: float,
        dropout: float,
        dtype: torch.dtype,
    ) -> Tensor:
        y_NO = product(x_NI) if product else F.linear(x_NI, weight_OI, bias_O)  # type: ignore
        mask = None
        if dropout:
            mask = torch.empty_like(x_NI, dtype=a_RI.dtype).bernoulli_(1 - dropout).bool()
        dropped_NI = _dropped(x_NI, mask, dropout, a_RI.dtype).to(dtype)
        h_NR = dropped_NI @ a_RI.to(dtype).T  # (N, in) @ (in, r)
        # In place: there is never a second (N, out) in y's dtype.
        if y_NO.dtype == dtype:
            y_NO.addmm_(h_NR, b_OR.to(dtype).T, alpha=scaling)  # (N, r) @ (r, out)
        else:
            y_NO.add_(h_NR @ b_OR.to(dtype).T, alpha=scaling)
        ctx.save_for_backward(x_NI, h_NR, weight_OI, bias_O, a_RI, b_OR, mask)
        ctx.unpacked, ctx.scaling, ctx.dropout, ctx.dtype = unpacked, scaling, dropout, dtype
        return y_NO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (g_NO,) = grads
        x_NI, h_NR, weight_OI, bias_O, a_RI, b_OR, mask = ctx.saved_tensors
        needs_x, _, needs_bias, needs_a, needs_b = ctx.needs_input_grad[:5]
        wide, dtype = a_RI.dtype, ctx.dtype
        dx_NI = dbias_O = da_RI = db_OR = None
        scaled_NO = g_NO.to(dtype)
        dh_NR = (scaled_NO @ b_OR.to(dtype)) * ctx.scaling  # (N, out) @ (out, r)
        if needs_b:
            db_OR = ((scaled_NO.T @ h_NR) * ctx.scaling).to(wide)  # (out, N) @ (N, r)
        del scaled_NO
        if needs_bias:
            dbias_O = g_NO.sum(0).to(bias_O.dtype)
        if needs_a:
            dropped_NI = _dropped(x_NI, mask, ctx.dropout, wide).to(dtype)
            da_RI = (dh_NR.T @ dropped_NI).to(wide)  # (r, N) @ (N, in)
            del dropped_NI
        if needs_x:
            weight_OI = ctx.unpacked() if ctx.unpacked else weight_OI
            dx_NI = (g_NO @ weight_OI.to(g_NO.dtype)).to(x_NI.dtype)  # (N, out) @ (out, in)
            if mask is None and dx_NI.dtype == dtype:
                dx_NI.addmm_(dh_NR, a_RI.to(dtype))  # (N, r) @ (r, in)
            else:
                dx_NI.add_(_dropped(dh_NR @ a_RI.to(dtype), mask, ctx.dropout, wide))
        return dx_NI, None, dbias_O, da_RI, db_OR, None, None, None, None, None


def _dropped(x: Tensor, mask: Tensor | None, dropout: float, dtype: torch.dtype) -> Tensor:
    """Return x in ``dtype``, zero outside the mask and scaled up inside."""
    if mask is None:
        return x.to(dtype)
    return mask.to(dtype).div_(1 - dropout).mul_(x)


def frozen_linear(
    x: Tensor, product: Callable[[Tensor], Tensor], weight: Callable[[], Tensor]
) -> Tensor:
    """Return x W' + b by ``product``, and save nothing for the backward pass.

    Args:
        x: (..., in).
        product: returns x W' + b (N, out) for x (N, in), in x's dtype; not a view of it.
        weight: returns W (out, in); called once per backward pass.

    Returns:
        (..., out). Only x gets a gradient.
    """
    flat_NI = x.reshape(-1, x.shape[-1]).to(product_dtype(x, x.dtype))
    y_NO: Tensor = _FrozenLinear.apply(flat_NI, product, weight)
    # Not reshaped where possible: an in-place addition must not meet a view.
    return y_NO if x.ndim == 2 else y_NO.reshape(*x.shape[:-1], y_NO.shape[-1])


def core_beside(
    x: Tensor,
    base: Callable[[Tensor], Tensor],
    core_RS: Tensor,
    q_out_OR: Tensor,
    q_in_IS: Tensor,
) -> Tensor:
    """Return base(x) + ((x Q_in) S') Q_out', saving only x Q_in and what ``base`` saves.

    Args:
        x: (..., in). Under autocast all products are made in autocast's dtype, else in x's.
        base: the frozen layer: (N, in) -> (N, out), a new tensor that its backward pass does not
            need, for it is added to in place.
        core_RS: S, (r_out, r_in); gets the gradient (g Q_out)' (x Q_in).
        q_out_OR, q_in_IS: (out, r_out) and (in, r_in), frozen.

    Returns:
        (..., out).
    """
    dtype = product_dtype(x, x.dtype)
    flat_NI = x.reshape(-1, x.shape[-1]).to(dtype)
    y_NO: Tensor = _CoreBeside.apply(
        flat_NI, base(flat_NI).to(dtype), core_RS.to(dtype), q_out_OR.to(dtype), q_in_IS.to(dtype)
    )
    return y_NO.reshape(*x.shape[:-1], y_NO.shape[-1])


def adapter_linear(
    x: Tensor,
    weight_OI: Tensor | None,
    bias_O: Tensor | None,
    a_RI: Tensor,
    b_OR: Tensor,
    *,
    scaling: float,
    dropout: float = 0.0,
    product: Callable[[Tensor], Tensor] | None = None,
    unpacked: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Return x W' + b + s (dropout(x) A') B', saving x once and in its own dtype.

    Plain autograd would save x after dropout in the dtype of A, beside the x that other layers
    save. Dropout saves a mask of one byte per value.

    Args:
        x: (..., in). The adapter's products are made in autocast's dtype inside it, else in A's.
        weight_OI: (out, in), frozen; None where ``product`` and ``unpacked`` stand for it.
        bias_O: (out,) or None; with ``product``, which adds its own, None.
        a_RI, b_OR: (r, in) and (out, r) of one dtype.
        scaling: s.
        dropout: share of x that the adapter does not see.
        product: returns x W' + b (N, out) for x (N, in), a new tensor.
        unpacked: returns W (out, in); called once per backward pass.

    Returns:
        (..., out), in the dtype of x W' + b.
    """
    flat_NI = x.reshape(-1, x.shape[-1])
    dtype = product_dtype(x, a_RI.dtype)
    y_NO: Tensor = _AdapterLinear.apply(
        flat_NI, weight_OI, bias_O, a_RI, b_OR, product, unpacked, scaling, dropout, dtype
    )
    return y_NO.reshape(*x.shape[:-1], y_NO.shape[-1])
