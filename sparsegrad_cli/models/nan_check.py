"""Find NaN and infinite values in weights and losses, and the module that produced them first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad_cli import distributed
from sparsegrad_cli.errors import NonFiniteError
from sparsegrad_cli.models.module_trace import tensors_in, trace_modules
from sparsegrad_cli.models.sharded_tensors import local_part, reshard

LOSS, INPUTS = "the loss", "the inputs"


def check_weights(model: nn.Module, step: int) -> None:
    """Check that all trained weights are finite. All processes of a run have to call it.

    Args:
        step: Number of the last optimizer step, for the error.

    Raises:
        NonFiniteError: A parameter holds NaN or Inf; the error names the first one.
    """
    reshard(model)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    own = next((n for n, (_, p) in enumerate(trained) if not finite(local_part(p))), len(trained))
    first = min(distributed.all_gather(own))  # The damaged shard may be in one process only.
    if first < len(trained):
        name = trained[first][0]
        raise NonFiniteError(
            f"weights are not finite after step {step}: the first is {name}",
            where="train.learning_rate",
            fix="lower it, or clip (train.max_grad_norm: 1); no checkpoint was made of this",
            details={"step": step, "module": name.rpartition(".")[0], "parameter": name},
        )


def first_non_finite(model: nn.Module, forward: Callable[[], Tensor]) -> str | None:
    """Find the first module of a forward pass that returns NaN or Inf for finite inputs.

    Args:
        forward: Runs the model and returns the loss. Random state is restored afterwards.

    Returns:
        The module's name. Where a function between two modules failed, the name of the module that
        contains it. ``LOSS`` if only the loss is not finite, ``INPUTS`` if the model's inputs
        already were not, None if everything is finite this time.
    """
    found: list[str] = []

    def check_inputs(name: str, inputs: Any) -> None:
        # Hidden states come first. Later inputs may be masks, which hold -inf by design.
        if not all(finite(tensor) for tensor in list(tensors_in(inputs))[:1]):
            found.append(running[-1] if running else INPUTS)

    def check_output(name: str, output: Any) -> None:
        if not all(finite(tensor) for tensor in tensors_in(output)):
            found.append(name)

    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with (
        torch.random.fork_rng(devices=devices),
        torch.no_grad(),
        trace_modules(model, before=check_inputs, after=check_output) as running,
    ):
        loss = forward()
    if found:
        return found[0]
    return None if finite(loss) else LOSS


def finite(tensor: Tensor) -> bool:
    """Return whether a tensor holds neither NaN nor Inf; integers are always finite."""
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
