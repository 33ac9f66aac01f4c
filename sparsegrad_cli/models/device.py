"""Where a run computes."""

from __future__ import annotations

import torch

from sparsegrad_cli.recipe.schema import Recipe


def device_of(recipe: Recipe) -> torch.device:
    """The current CUDA device, or the CPU where there is none or the recipe says so."""
    if recipe.train.use_cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
