"""Dropout with cheap random masks, alone and before a residual sum and a LayerNorm.

Torch's dropout on the CPU draws a number of 64 bits per value. Here 16 bits decide on a value, a
quarter of the random bits; the masks are therefore other masks than torch's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def keep_mask(shape: Sequence[int], p: float) -> tuple[Tensor, float]:
    """Draw which values dropout keeps, on the CPU.

    16 random bits decide on a value, so p is rounded to a multiple of 2**-16.

    Args:
        shape: of the mask.
        p: probability of 0, from 0 to 1.

    Returns:
        The mask (int8, 1 where kept) and the factor of kept values, 1 / (1 - p) for the rounded p.
    """
    count = math.prod(shape)
    words = torch.empty(-(-count // 4), dtype=torch.int64)
    # From the lowest number on: without bounds, random_ never sets the sign bit.
    words.random_(-(2**63), None)
    zeros = round(p * 2**16)
    threshold = zeros - 2**15  # A uniform int16 is below it with probability zeros / 2**16.
    bits = words.view(torch.int16)[:count]
    if zeros == 0 or zeros == 2**16:
        return bits.new_full(tuple(shape), int(zeros == 0), dtype=torch.int8), 1.0
    # Cheaper than a comparison: the two values around the threshold become 0 and 1.
    kept = bits.clamp_(threshold - 1, threshold).sub_(threshold - 1)
    return kept.to(torch.int8).view(tuple(shape)), 1 / (1 - zeros / 2**16)


class _CheapDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        kept, ctx.factor = keep_mask(x.shape, p)
        ctx.save_for_backward(kept)
        return kept.to(x.dtype).mul_(ctx.factor).mul_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        (grad,) = grads
        (kept,) = ctx.saved_tensors
        return kept.to(grad.dtype).mul_(ctx.factor).mul_(grad), None


class CheapDropout(nn.Dropout):
    """nn.Dropout with masks of :func:`keep_mask` on the CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x of any shape with values dropped."""
        if not self.training or not 0 < self.p < 1 or self.inplace or x.device.type != "cpu":
            return super().forward(x)
        dropped: Tensor = _CheapDropout.apply(x, self.p)
        return dropped


class _DropoutAddNorm(torch.autograd.Function):
    """See :func:`dropout_add_norm`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight_I: Tensor,
        bias_I: Tensor | None,
        eps: float,
        dropout: float,
    ) -> Tensor:
        kept = None
        if dropout:
            kept, ctx.factor = keep_mask(x.shape, dropout)
            total = kept.to(x.dtype).mul_(ctx.factor).mul_(x)
            total = total.add_(residual) if total.dtype == residual.dtype else total + residual
        else:
            total = x + residual
        total = total.to(weight_I.dtype)
        out, mean, rstd = torch.native_layer_norm(total, total.shape[-1:], weight_I, bias_I, eps)
        ctx.save_for_backward(total, mean, rstd, weight_I, bias_I, kept)
        ctx.dtypes = x.dtype, residual.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (g,) = grads
        total, mean, rstd, weight_I, bias_I, kept = ctx.saved_tensors
        needs_x, needs_residual, needs_weight, needs_bias = ctx.needs_input_grad[:4]
        of_x, of_residual = ctx.dtypes
        dtotal, dweight_I, dbias_I = torch.ops.aten.native_layer_norm_backward(
            g.to(total.dtype),
            total,
            total.shape[-1:],
            mean,
            rstd,
            weight_I,
            bias_I,
            [needs_x or needs_residual, needs_weight, needs_bias],
        )
        dx = None
        if needs_x:
            dx = dtotal.to(of_x)
            if kept is not None:
                dx = kept.to(of_x).mul_(ctx.factor).mul_(dx)
        dresidual = dtotal.to(of_residual) if needs_residual else None
        return dx, dresidual, dweight_I, dbias_I, None, None


def dropout_add_norm(
    x: Tensor,
    residual: Tensor,
    weight_I: Tensor,
    bias_I: Tensor | None,
    eps: float,
    dropout: float = 0.0,
) -> Tensor:
    """Return LayerNorm(dropout(x) + residual), saving the sum and one byte of mask per value.

    Args:
        x, residual: (..., in), on the CPU.
        weight_I, bias_I: of the norm; its dtype is the result's.
        eps: added to the variance.
        dropout: probability with which a value of x is dropped.

    Returns:
        (..., in). It is differentiable once, in all tensors.
    """
    with torch.autocast("cpu", enabled=False):
        out: Tensor = _DropoutAddNorm.apply(x, residual, weight_I, bias_I, eps, dropout)
    return out
