"""The gate of a gated MLP, act(gate) * up, keeping two wide tensors for backward instead of three.

Plain autograd keeps the gate (for the activation function), its activation and up (for the
product). The activation is computed again from the gate here: one function of each entry.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, activation: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return activation(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor | None, None]:
        (g,) = grads
        gate, up = ctx.saved_tensors
        dgate = dup = None
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            active = ctx.activation(leaf)
        if ctx.needs_input_grad[1]:
            dup = g * active.detach()
        if ctx.needs_input_grad[0]:
            (dgate,) = torch.autograd.grad(active, leaf, g * up)
        return dgate, dup, None


def gated(gate: Tensor, up: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """activation(gate) * up, of equal shapes; ``activation`` has no parameters and no randomness.

    Values and gradients are those of plain autograd.
    """
    out: Tensor = _Gated.apply(gate, up, activation)
    return out
