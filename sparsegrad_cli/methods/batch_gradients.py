"""Gradients of a run's batches with respect to frozen weights: what some methods start from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad_cli.errors import NonFiniteError
from sparsegrad_cli.methods.implementation import TrainingData
from sparsegrad_cli.models.module_trace import evaluating
from sparsegrad_cli.models.precision import HALF
from sparsegrad_cli.models.targets import Target


def summed_gradients(
    model: nn.Module, targets: list[Target], training: TrainingData
) -> dict[str, Tensor]:
    """Return target name -> sum over the batches of c dL/dW, (out, in), float32 or wider.

    c is positive: gradients in float16 would underflow. Use their signs and their order within a
    target only. W may be packed: the gradients are products of the input of a layer and the
    gradient of its output.

    Raises:
        NonFiniteError: a loss is NaN or infinite.
    """
    sums: dict[str, Tensor] = {}
    first = next(model.parameters())
    half = next((p.dtype for p in model.parameters() if p.dtype in HALF), None)
    scale = 4096.0 if half == torch.float16 else 1.0
    with evaluating(model), _hooked(model, targets, sums):  # Dropout would only add noise.
        for number, batch in enumerate(training.batches()):
            # What trains is float32 among half-precision weights: autocast joins the two.
            with torch.autocast(first.device.type, half, enabled=half is not None):
                loss = training.loss(batch)
            if not torch.isfinite(loss.detach()):
                raise NonFiniteError(
                    f"the loss of calibration batch {number + 1} is {float(loss.detach())}",
                    where="calibration",
                    fix="use model.dtype: float32, or look at the data of this batch",
                )
            (loss * scale).backward()
            model.zero_grad(set_to_none=True)
    return sums


@contextmanager
def _hooked(model: nn.Module, targets: list[Target], sums: dict[str, Tensor]) -> Iterator[None]:
    """Add every gradient with respect to a target's weight to ``sums`` inside."""

    def add(name: str, x: Tensor, g: Tensor) -> None:
        wide = torch.promote_types(x.dtype, torch.float32)
        # (out, N) @ (N, in)
        found_OI = g.flatten(0, -2).to(wide).T @ x.detach().flatten(0, -2).to(wide)
        sums[name] = sums[name] + found_OI if name in sums else found_OI

    def after(name: str, layer: nn.Module, inputs: tuple[Any, ...], y: Tensor) -> Tensor:
        # All below may be frozen, and the output would then have no gradient.
        traced = y + torch.zeros((), dtype=y.dtype, device=y.device, requires_grad=True)
        traced.register_hook(partial(add, name, inputs[0]))
        return traced

    handles = [
        model.get_submodule(target.name).register_forward_hook(partial(after, target.name))
        for target in targets
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
