"""The device of a run."""

from __future__ import annotations

import torch

from sparsegrad_cli.recipe.schema import Recipe


def device_of(recipe: Recipe) -> torch.device:
    """Return the current CUDA device, or the CPU without CUDA or with ``train.use_cpu``."""
    if recipe.train.use_cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
