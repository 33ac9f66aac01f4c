"""Losses and weights that are no numbers any more: where that began."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad_cli import distributed
from sparsegrad_cli.errors import NonFiniteError
from sparsegrad_cli.memory.storage_tracker import tensors_in
from sparsegrad_cli.models.sharded_tensors import fold, own_part

LOSS, INPUTS = "the loss", "the inputs"


def check_weights(model: nn.Module, step: int) -> None:
    """Refuse to keep weights that are not finite; of processes that train together all ask.

    Raises:
        NonFiniteError: names the first such parameter.
    """
    fold(model)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    own = next((n for n, (_, p) in enumerate(trained) if not finite(own_part(p))), len(trained))
    first = min(distributed.all_gather(own))  # a shard may be lost in one process alone
    if first < len(trained):
        name = trained[first][0]
        raise NonFiniteError(
            f"weights are not finite after step {step}: the first is {name}",
            where="train.learning_rate",
            fix="lower it, or clip (train.max_grad_norm: 1); no checkpoint was made of this",
            details={"step": step, "module": name.rpartition(".")[0], "parameter": name},
        )


def first_non_finite(model: nn.Module, forward: Callable[[], Tensor]) -> str | None:
    """The first module of a forward pass whose output is not finite though its input was.

    Where the output of a function between modules went wrong, the module that it is in.

    Args:
        forward: runs the model and returns the loss. Nothing of it is kept, and random numbers
            that it draws are given back.

    Returns:
        The module's name, ``LOSS`` if only the loss went wrong, ``INPUTS`` if what went in was
        wrong already; None if all is finite this time.
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices), torch.no_grad(), _watched(model) as found:
        loss = forward()
    if found:
        return found[0]
    return None if finite(loss) else LOSS


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[str]]:
    """Inside, the list fills with names of modules, the first to go wrong first."""
    found: list[str] = []
    inside: list[str] = []
    handles = []

    def watch(name: str, module: nn.Module) -> None:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            # Hidden states come first; what follows may be masks, which hold -inf by design.
            if not all(finite(t) for t in list(tensors_in((args, kwargs)))[:1]):
                found.append(inside[-1] if inside else INPUTS)
            inside.append(name)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            inside.pop()
            if not all(finite(tensor) for tensor in tensors_in(output)):
                found.append(name)

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))

    for name, module in model.named_modules():
        watch(name or type(model).__name__, module)
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def finite(tensor: Tensor) -> bool:
    """Whether all of it is; whole numbers always are."""
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
