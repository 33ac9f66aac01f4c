"""Keeping less for the backward pass, without changing a number."""

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


def save_memory(model: nn.Module, targets: Sequence[Target], recompute: str = "none") -> None:
    """Let a freshly loaded model keep less for the backward pass, whatever method then trains it.

    Args:
        model: as loaded: targets are plain layers.
        targets: its targets.
        recompute: ``none``, or ``activation`` as in :func:`recompute_activations`.
    """
    use_byte_dropout(model)
    use_efficient_gated_mlps(model, targets)
    if recompute == "activation":
        recompute_activations(model, targets)


def use_byte_dropout(model: nn.Module) -> int:
    """Replace every nn.Dropout of the model by one whose mask takes a byte; returns how many."""
    found = [name for name, module in model.named_modules() if type(module) is nn.Dropout]
    for name in found:
        plain = model.get_submodule(name)
        assert isinstance(plain, nn.Dropout)
        efficient = ByteDropout(plain.p, plain.inplace)
        efficient.training = plain.training
        model.set_submodule(name, efficient)
    return len(found)


def recompute_activations(model: nn.Module, targets: Sequence[Target]) -> list[str]:
    """Run the modules that hold the wide activations again in the backward pass.

    The module that holds both the layer which widens and the activation function
    (``intermediate``, ``mlp``) then keeps its own input only, at the price of one product of that
    layer more.

    Returns:
        Names of the modules.

    Raises:
        UsageError: the widening layers lie in no module of their own.
    """
    widening = [t for t in targets if t.out_features > t.in_features]
    owners = sorted({t.name.rpartition(".")[0] for t in widening})
    blocks = {t.name.removesuffix(f".{t.kind}") for t in targets}
    if not owners or blocks & set(owners):
        raise UsageError(
            "this architecture's MLP is no module of its own: its activation cannot be recomputed",
            where="method.recompute",
            fix="use method.recompute: none, or train.gradient_checkpointing: true",
        )
    for name in owners:
        module = model.get_submodule(name)
        # On the instance, as gradient checkpointing of single layers is done elsewhere: a wrapper
        # module would rename its parameters, and nothing may change on the class.
        module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)
    return owners


def use_efficient_gated_mlps(model: nn.Module, targets: Sequence[Target]) -> int:
    """Let gated MLPs keep two wide tensors instead of three (numerics/saved_activations.py).

    A module counts as a gated MLP if it has ``gate_proj``, ``up_proj``, ``down_proj`` and
    ``act_fn``, as in LLaMA and its kin, and if, asked, it computes what such an MLP does: other
    modules of these names are left alone.

    Returns:
        How many there are.
    """
    owners = {t.name.rpartition(".")[0] for t in targets}
    count = 0
    for name in sorted(owners):
        module = model.get_submodule(name)
        parts = ("gate_proj", "up_proj", "down_proj", "act_fn")
        if not all(isinstance(getattr(module, part, None), nn.Module) for part in parts):
            continue
        if next(iter(module.act_fn.parameters()), None) is not None:  # type: ignore[union-attr]
            continue
        efficient = functools.partial(_gated_mlp, module)
        if _gives_same_output(module, efficient):
            module.forward = efficient
            count += 1
    return count


def _gated_mlp(module: Any, x: Tensor) -> Tensor:
    """down(act(gate(x)) * up(x))."""
    out: Tensor = module.down_proj(gated(module.gate_proj(x), module.up_proj(x), module.act_fn))
    return out


@torch.no_grad()
def _gives_same_output(module: nn.Module, efficient: Callable[[Tensor], Tensor]) -> bool:
    """Whether both give the same on a few numbers."""
    gate = module.gate_proj
    assert isinstance(gate, nn.Module)
    layer: Any = find_quantized(gate) or gate
    width = layer.in_features if is_quantized(layer) else layer.weight.shape[1]
    x = torch.linspace(-1, 1, 2 * width).reshape(1, 2, -1)
    x = x.to(next(gate.parameters()).device, dtype_of(gate))
    before = module.training
    try:
        # In training too, where a module may have dropout that evaluation does not show.
        return all(torch.equal(module.train(mode)(x), efficient(x)) for mode in (False, True))
    except (TypeError, ValueError, RuntimeError):
        return False
    finally:
        module.train(before)
