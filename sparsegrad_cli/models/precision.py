"""Train parameters in at least float32: half-precision weights lose small updates."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from sparsegrad_cli.recipe.schema import Recipe, TrainSection

HALF = (torch.bfloat16, torch.float16)


def autocast_dtype(train: TrainSection) -> torch.dtype | None:
    """Return the dtype of autocast in training, or None without it."""
    name = train.autocast
    dtype: torch.dtype | None = None if name is None else getattr(torch, name)
    return dtype


def autocast_to_use(recipe: Recipe) -> torch.dtype | None:
    """Return the dtype of autocast if a trained model mixes float32 and half precision, or None."""
    return None if recipe.model.dtype == "float32" else autocast_dtype(recipe.train)


def unfreeze_parameter(parameter: nn.Parameter) -> None:
    """Make a parameter trainable; convert a half-precision one to float32 first, in place."""
    if parameter.dtype in HALF:
        parameter.data = parameter.data.float()
    parameter.requires_grad_(True)


def accept_half_inputs(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Let the layers that own float32 parameters accept half-precision inputs.

    A float32 head after a half-precision body needs this. Under autocast, which casts by itself,
    inputs are left unchanged.

    Args:
        model: The model; its layers get a forward pre-hook.
        parameters: The parameters whose layers are changed, if they are float32.
    """
    opened = {id(parameter) for parameter in parameters if parameter.dtype == torch.float32}
    for module in model.modules():
        if any(id(own) in opened for own in module.parameters(recurse=False)):
            module.register_forward_pre_hook(_widen)


def _widen(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    def widened(value: Any) -> Any:
        half = isinstance(value, torch.Tensor) and value.dtype in HALF
        if not half or torch.is_autocast_enabled(value.device.type):
            return value
        return value.float()

    return tuple(widened(value) for value in inputs)
