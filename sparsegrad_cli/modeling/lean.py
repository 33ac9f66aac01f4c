"""Keeping less for the backward pass, without changing a number."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import nn
from torch.utils.checkpoint import checkpoint

from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.modeling.targets import Target
from sparsegrad_cli.numerics.dropout import ByteDropout


def use_byte_masks(model: nn.Module) -> int:
    """Replace every nn.Dropout of the model by one whose mask takes a byte; returns how many."""
    found = [name for name, module in model.named_modules() if type(module) is nn.Dropout]
    for name in found:
        plain = model.get_submodule(name)
        assert isinstance(plain, nn.Dropout)
        lean = ByteDropout(plain.p, plain.inplace)
        lean.training = plain.training
        model.set_submodule(name, lean)
    return len(found)


def recompute_activations(model: nn.Module, targets: Sequence[Target]) -> list[str]:
    """Run the modules that hold the wide activations again in the backward pass.

    The input of the activation function is the widest tensor that a core layer leaves alive. The
    module that holds both the layer which widens and the function (``intermediate``, ``mlp``) then
    keeps its own input only, at the price of one product of that layer more.

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
