"""Save fewer tensors for the backward pass, without changing any result."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.models.quantized import dtype_of, find_quantized, is_quantized
from sparsegrad_cli.models.targets import Target
from sparsegrad_cli.numerics.saved_activations import ByteDropout, gated
from sparsegrad_cli.numerics.seeding import temporary_seed


def save_memory(model: nn.Module, targets: Sequence[Target], recompute: str = "none") -> None:
    """Reduce the memory that a model's activations take until the backward pass.

    Call it on a freshly loaded model, before a method replaces its layers.

    Args:
        model: The model, changed in place.
        targets: Its target modules, which must be plain layers.
        recompute: ``none``, or ``activation`` to call :func:`recompute_activations`.
    """
    use_byte_dropout(model)
    use_efficient_gated_mlps(model, targets)
    if recompute == "activation":
        recompute_activations(model, targets)


def use_byte_dropout(model: nn.Module) -> int:
    """Replace every nn.Dropout by one that saves one byte per mask entry; return their number."""
    found = [name for name, module in model.named_modules() if type(module) is nn.Dropout]
    for name in found:
        plain = model.get_submodule(name)
        assert isinstance(plain, nn.Dropout)
        efficient = ByteDropout(plain.p, plain.inplace)
        efficient.training = plain.training
        model.set_submodule(name, efficient)
    return len(found)


def recompute_activations(model: nn.Module, targets: Sequence[Target]) -> list[str]:
    """Recompute the wide activations of MLPs in the backward pass.

    The module that contains both the widening layer and the activation function (``intermediate``,
    ``mlp``) then saves its input only. This costs one more product of the widening layer.

    Args:
        model: The model, changed in place.
        targets: Its target modules.

    Returns:
        The names of the modules that are recomputed.

    Raises:
        UsageError: The widening layers are not in a module of their own.
    """
    widening = [t for t in targets if t.out_features > t.in_features]
    owners = sorted({t.name.rpartition(".")[0] for t in widening})
    blocks = {t.name.removesuffix(f".{t.kind}") for t in targets}
    if not owners or blocks & set(owners):
        raise UsageError(
            "this architecture's MLP is not a module of its own, so its activation cannot be "
            "recomputed",
            where="method.recompute",
            fix="use method.recompute: none, or train.gradient_checkpointing: true",
        )
    for name in owners:
        module = model.get_submodule(name)
        if getattr(module.forward, "func", None) is checkpoint:
            continue
        # Set on the instance: a wrapper module would rename the parameters, and a change on the
        # class would reach other models.
        module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)
    return owners


def use_efficient_gated_mlps(model: nn.Module, targets: Sequence[Target]) -> int:
    """Let gated MLPs save two wide tensors instead of three (numerics/saved_activations.py).

    A gated MLP has ``gate_proj``, ``up_proj``, ``down_proj`` and ``act_fn``, as in LLaMA. It is
    changed only if it gives exactly the same output afterwards.

    Args:
        model: The model, changed in place.
        targets: Its target modules, in whose parents gated MLPs are searched.

    Returns:
        The number of MLPs that were changed.
    """
    owners = {t.name.rpartition(".")[0] for t in targets}
    count = 0
    for name in sorted(owners):
        module = model.get_submodule(name)
        parts = ("gate_proj", "up_proj", "down_proj", "act_fn")
        if not all(isinstance(getattr(module, part, None), nn.Module) for part in parts):
            continue
        # It was changed before, or accelerate moves its inputs between devices.
        ours = getattr(module.forward, "func", None) in (checkpoint, _gated_mlp)
        if ours or hasattr(module, "_hf_hook"):
            continue
        if next(iter(module.act_fn.parameters()), None) is not None:  # type: ignore[union-attr]
            continue
        efficient = functools.partial(_gated_mlp, module)
        if _gives_same_output(module, efficient):
            module.forward = efficient
            count += 1
    return count


def _gated_mlp(module: Any, x: Tensor) -> Tensor:
    """Return down(act(gate(x)) * up(x)) for x (..., in)."""
    out: Tensor = module.down_proj(gated(module.gate_proj(x), module.up_proj(x), module.act_fn))
    return out


def _seeded(compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return ``compute(x)`` with the same random numbers in every call."""
    with temporary_seed(0):
        return compute(x)


@torch.no_grad()
def _gives_same_output(module: nn.Module, efficient: Callable[[Tensor], Tensor]) -> bool:
    """Return whether both give bit-identical output for a small input, in both modes."""
    gate = module.gate_proj
    assert isinstance(gate, nn.Module)
    layer: Any = find_quantized(gate) or gate
    width = layer.in_features if is_quantized(layer) else layer.weight.shape[1]
    x = torch.linspace(-1, 1, 2 * width).reshape(1, 2, -1)
    x = x.to(next(gate.parameters()).device, dtype_of(gate))
    before = module.training
    try:
        # A module may have dropout, which shows in training mode only.
        for mode in (False, True):
            module.train(mode)
            if not torch.equal(_seeded(module, x), _seeded(efficient, x)):
                return False
        return True
    except (TypeError, ValueError, RuntimeError):
        return False
    finally:
        module.train(before)
