"""Checkpoints of any model and optimizer, written without a training run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsegrad_cli.run.checkpoint_state import LoopState, Progress
from sparsegrad_cli.training.checkpoint import random_state, whole_state, write_checkpoint


def save(
    folder: Path,
    weights: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    **progress: Any,
) -> None:
    """Write a checkpoint's files into a folder, which is made if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    state = LoopState(progress=Progress(**{"step": 3, "max_steps": 9, **progress}))
    states = [random_state()]
    write_checkpoint(folder, state, weights, whole_state(optimizer), scheduler, states)
