"""A frozen layer whose weight gets a change of any form: y = x (W + D)' + b.

A change without a product form, such as a sparse matrix or a matrix of kernel values, is built as
a whole matrix. Built by plain autograd, it would live from the forward pass to the backward pass
in every layer. Here it is built again in the backward pass, and only x and the change's parameters
are saved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sparsegrad_cli.numerics.core_linear import product_dtype


class _MatrixChangeLinear(torch.autograd.Function):
    """See :func:`matrix_change_linear`. x has two dimensions and the dtype of the products."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NI: Tensor,
        weight: Callable[[], Tensor],
        bias_O: Tensor | None,
        build: Callable[..., Tensor],
        *parameters: Tensor,
    ) -> Tensor:
        changed_OI = _changed(weight, build(*parameters), x_NI.dtype)
        ctx.save_for_backward(x_NI, *parameters)
        ctx.weight, ctx.build, ctx.bias_dtype = weight, build, None
        if bias_O is not None:
            ctx.bias_dtype = bias_O.dtype
            bias_O = bias_O.to(x_NI.dtype)
        return F.linear(x_NI, changed_OI, bias_O)  # (N, in) @ (in, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (g_NO,) = grads
        x_NI, *parameters = ctx.saved_tensors
        needs_x, _, needs_bias, _, *needed = ctx.needs_input_grad
        dx_NI = dbias_O = None
        dparameters: list[Tensor | None] = [None] * len(parameters)
        with torch.enable_grad():
            leaves = [
                p.detach().requires_grad_(need) for p, need in zip(parameters, needed, strict=True)
            ]
            delta_OI = ctx.build(*leaves)
        if needs_x:
            # (N, out) @ (out, in)
            dx_NI = g_NO @ _changed(ctx.weight, delta_OI.detach(), g_NO.dtype)
        if needs_bias:
            dbias_O = g_NO.sum(0).to(ctx.bias_dtype)
        if any(needed):
            ddelta_OI = (g_NO.T @ x_NI).to(delta_OI.dtype)  # (out, N) @ (N, in)
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            found = iter(torch.autograd.grad(delta_OI, wanted, ddelta_OI))
            dparameters = [next(found) if need else None for need in needed]
        return dx_NI, None, dbias_O, None, *dparameters


def _changed(weight: Callable[[], Tensor], delta_OI: Tensor, dtype: torch.dtype) -> Tensor:
    """Return W + D in ``dtype``, added in the wider of their dtypes."""
    return (weight() + delta_OI).to(dtype)


def matrix_change_linear(
    x: Tensor,
    weight: Callable[[], Tensor],
    bias_O: Tensor | None,
    build: Callable[..., Tensor],
    *parameters: Tensor,
) -> Tensor:
    """Return x (W + D)' + b for D = build(*parameters), and save x and the parameters only.

    Args:
        x: (..., in). Under autocast all products with x are made in autocast's dtype, else in x's.
        weight: returns W (out, in), frozen; called once per pass.
        bias_O: (out,) or None.
        build: returns D (out, in) with plain, differentiable operations; called once per pass, and
            must return the same D in both. It runs without autocast.
        parameters: what D is built from; they get gradients.

    Returns:
        (..., out), in the dtype of the products.
    """
    dtype = product_dtype(x, x.dtype)
    flat_NI = x.reshape(-1, x.shape[-1]).to(dtype)

    def precise(*tensors: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return build(*tensors)

    y_NO: Tensor = _MatrixChangeLinear.apply(flat_NI, weight, bias_O, precise, *parameters)
    return y_NO.reshape(*x.shape[:-1], y_NO.shape[-1])
