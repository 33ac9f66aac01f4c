"""The gate of a gated MLP, act(gate) * up, keeping two wide tensors for backward instead of three.

Plain autograd keeps the gate (for the activation function), its activation and up (for the
product). The activation is computed again from the gate here: one function of each entry.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, activation: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        active = activation(gate)
        # In place only where the result is the activation's own: an identity returns the gate
        # itself, which is saved, and up may be of another dtype or shape.
        # Storages are compared by their handles, which tensors without memory have, too.
        shared = active.untyped_storage()._cdata == gate.untyped_storage()._cdata
        if shared or active.dtype != up.dtype or active.shape != up.shape:
            return active * up
        return active.mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor | None, None]:
        (g,) = grads
        gate, up = ctx.saved_tensors
        dgate = dup = None
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            active = ctx.activation(leaf)
        if ctx.needs_input_grad[1]:
            dup = (g * active.detach()).to(up.dtype).sum_to_size(up.shape)
        if ctx.needs_input_grad[0]:
            dactive = (g * up).to(active.dtype).sum_to_size(active.shape)
            (dgate,) = torch.autograd.grad(active, leaf, dactive)
        return dgate, dup, None


def gated(gate: Tensor, up: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """activation(gate) * up, where ``activation`` has no parameters and no randomness.

    Values and gradients are those of plain autograd.

    Raises:
        ValueError: the activation works in place, so that the gate could not be kept.
    """
    if getattr(activation, "inplace", False):
        raise ValueError(
            f"expected an activation that leaves its input alone, got {activation}: "
            "leave out inplace=True"
        )
    out: Tensor = _Gated.apply(gate, up, activation)
    return out
