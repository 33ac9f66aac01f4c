"""Operations that save less for the backward pass than plain autograd, with the same values.

:func:`gated`, the gate act(gate) * up of a gated MLP, saves two wide tensors instead of three.
Plain autograd saves the gate (for the activation function), its activation and up (for the
product); here the activation is computed again from the gate.

:func:`after_activation`, the layer(act(x)) of an MLP, lets the layer save nothing of act(x), whose
x is saved for the activation's own gradient. A layer that trains would save act(x) for its weight's
gradient, which here is computed again.

:class:`ByteDropout` saves its mask as bool, one byte per value. On the CPU, torch saves the scaled
mask in the input's dtype. Output, gradient and the random numbers drawn are torch's, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
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
        # itself, which is saved, and up may have another dtype or shape.
        shared = active.untyped_storage() is gate.untyped_storage()
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
    """Return activation(gate) * up for an activation without parameters and randomness.

    Values and gradients are those of plain autograd.

    Raises:
        ValueError: the activation works in place, so the gate cannot be saved.
    """
    if getattr(activation, "inplace", False):
        raise ValueError(
            f"expected an activation that leaves its input alone, got {activation}: "
            "leave out inplace=True"
        )
    out: Tensor = _Gated.apply(gate, up, activation)
    return out


def after_activation(
    layer: Callable[[Tensor], Tensor], activation: Callable[[Tensor], Tensor], x: Tensor
) -> Tensor:
    """Return layer(activation(x)), for an activation without parameters and randomness.

    Values and gradients are those of plain autograd. Whatever the layer saves of the activation
    itself is computed again from x in the backward pass; other tensors are saved as usual.
    """
    if not x.requires_grad or getattr(activation, "inplace", False):
        return layer(activation(x))
    active = activation(x)
    # Emptied below: hooks may live as long as what they saved.
    storages = [active.untyped_storage()]
    count, dtype, kept = active.numel(), active.dtype, x.detach()

    def pack(saved: Tensor) -> Any:
        same = saved.numel() == count and saved.dtype == dtype and saved.is_contiguous()
        if same and saved.untyped_storage() is storages[0]:
            return saved.shape
        return _keep(saved)

    def unpack(packed: Any) -> Tensor:
        if not isinstance(packed, torch.Size):
            tensor: Tensor = packed.tensor
            return tensor
        with torch.no_grad():
            return activation(kept).to(dtype).view(packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        out = layer(active)
    storages.clear()
    return out


class _Kept:
    """A saved tensor, detached: a hook that returns its argument makes a circle of references."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()


_keep: Callable[[Tensor], Any] = _Kept


@contextmanager
def kept_by(keep: Callable[[Tensor], Any]) -> Iterator[None]:
    """Let ``keep`` make the objects that hold what :func:`after_activation` saves as usual.

    Of several hooks on saved tensors, autograd calls the innermost only. A memory meter that has
    hooks of its own would otherwise miss these tensors.

    Args:
        keep: returns an object that holds the tensor, detached, as its attribute ``tensor``.
    """
    global _keep
    before, _keep = _keep, keep
    try:
        yield
    finally:
        _keep = before


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
    """nn.Dropout with a mask of one byte per value on the CPU, as torch has elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x of any shape with values dropped."""
        plain = not self.training or not 0 < self.p < 1 or self.inplace or x.device.type != "cpu"
        if plain or not x.requires_grad:
            return super().forward(x)
        dropped: Tensor = _ByteDropout.apply(x, self.p)
        return dropped
