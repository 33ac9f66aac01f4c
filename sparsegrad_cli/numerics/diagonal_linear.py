"""A frozen linear layer with a trained diagonal beside it.

    y  = x W' + b + ((x Q_in) diag(d)) Q_out'
    dd = sum over tokens of (g Q_out) * (x Q_in)          dx = g W + ((g Q_out) diag(d)) Q_in'

It is :func:`sparsegrad_cli.numerics.core_linear.core_linear` with a diagonal core, without the
products (N, r) @ (r, r) and without the gradient of a whole core.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sparsegrad_cli.numerics.core_linear import product_dtype


class _DiagonalLinear(torch.autograd.Function):
    """See :func:`diagonal_linear`. x has two dimensions, and its dtype is that of products."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NI: Tensor,
        weight_OI: Tensor | None,
        bias_O: Tensor | None,
        d_R: Tensor,
        q_out_OR: Tensor,
        q_in_IR: Tensor,
        product: Callable[[Tensor], Tensor] | None,
        unpacked: Callable[[], Tensor] | None,
    ) -> Tensor:
        if product is None:
            assert weight_OI is not None
            y_NO = F.linear(x_NI, weight_OI.to(x_NI.dtype), bias_O)  # (N, in) @ (in, out)
        else:
            y_NO = product(x_NI).to(x_NI.dtype)
        u_NR = x_NI @ q_in_IR  # (N, in) @ (in, r)
        # In place: there is never a second (N, out).
        y_NO.addmm_(u_NR * d_R, q_out_OR.T)  # (N, r) @ (r, out)
        # W is kept as it is: a copy in x's dtype would live until the backward pass.
        ctx.save_for_backward(u_NR, weight_OI, d_R, q_out_OR, q_in_IR)
        ctx.unpacked = unpacked
        return y_NO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (g_NO,) = grads
        u_NR, weight_OI, d_R, q_out_OR, q_in_IR = ctx.saved_tensors
        needs_x, _, needs_bias, needs_d = ctx.needs_input_grad[:4]
        dx_NI = dd_R = dbias_O = None
        h_NR = g_NO @ q_out_OR  # (N, out) @ (out, r)
        if needs_d:
            dd_R = (h_NR * u_NR).sum(0)
        if needs_bias:
            dbias_O = g_NO.sum(0)
        if needs_x:
            weight_OI = ctx.unpacked() if ctx.unpacked else weight_OI
            dx_NI = g_NO @ weight_OI.to(g_NO.dtype)  # (N, out) @ (out, in)
            dx_NI.addmm_(h_NR * d_R, q_in_IR.T)  # (N, r) @ (r, in)
        return dx_NI, None, dbias_O, dd_R, None, None, None, None


def diagonal_linear(
    x: Tensor,
    weight_OI: Tensor | None,
    bias_O: Tensor | None,
    d_R: Tensor,
    q_out_OR: Tensor,
    q_in_IR: Tensor,
    *,
    product: Callable[[Tensor], Tensor] | None = None,
    unpacked: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Return x W' + b + ((x Q_in) diag(d)) Q_out', saving only x Q_in for the backward pass.

    Args:
        x: (..., in). Under autocast all products are made in autocast's dtype, else in x's.
        weight_OI: (out, in), frozen; None where ``product`` and ``unpacked`` stand for it.
        bias_O: (out,) or None; with ``product``, which adds its own, None.
        d_R: d, (r,); gets a gradient.
        q_out_OR, q_in_IR: (out, r) and (in, r), frozen.
        product: returns x W' + b (N, out) for x (N, in), a new tensor.
        unpacked: returns W (out, in); called once per backward pass.

    Returns:
        (..., out).
    """
    dtype = product_dtype(x, x.dtype)
    y_NO: Tensor = _DiagonalLinear.apply(
        x.reshape(-1, x.shape[-1]).to(dtype),
        weight_OI,
        None if bias_O is None else bias_O.to(dtype),
        d_R.to(dtype),
        q_out_OR.to(dtype),
        q_in_IR.to(dtype),
        product,
        unpacked,
    )
    return y_NO.reshape(*x.shape[:-1], y_NO.shape[-1])
