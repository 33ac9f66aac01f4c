"""Dropout that keeps its mask in one byte an entry.

On the CPU torch keeps, for the backward pass, the scaled mask in the input's dtype: four bytes an
entry where a bit would do. Here it is kept as bool. Output, gradient and the random numbers drawn
are torch's, bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _ByteDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        # The same draws and the same arithmetic as torch's own dropout on the CPU.
        scaled = torch.empty_like(x).bernoulli_(1 - p)
        ctx.save_for_backward(scaled.bool())
        ctx.p = p
        return x * scaled.div_(1 - p)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        (grad,) = grads
        (mask,) = ctx.saved_tensors
        return mask.to(grad.dtype).div_(1 - ctx.p).mul_(grad), None


class ByteDropout(nn.Dropout):
    """nn.Dropout with a mask of one byte an entry on the CPU; elsewhere torch's has that anyway."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        plain = not self.training or not 0 < self.p < 1 or self.inplace or x.device.type != "cpu"
        if plain or not x.requires_grad:
            return super().forward(x)
        dropped: Tensor = _ByteDropout.apply(x, self.p)
        return dropped
