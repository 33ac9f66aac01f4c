"""Evaluation of a model on its validation splits, over all processes of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sparsegrad_cli import distributed
from sparsegrad_cli.interruption import raise_if_requested
from sparsegrad_cli.tasks.objective import Judgement, Objective, ValidationBatch


def judge_splits(
    objective: Objective,
    model: nn.Module,
    splits: Mapping[str, Any],
    batches_of: Callable[[Any], Iterator[ValidationBatch]],
    autocast: Callable[[], AbstractContextManager[Any]],
) -> dict[str, Judgement]:
    """Judge a model on every split. All processes have to call it.

    Args:
        objective: Computes metrics.
        model: Not wrapped for data parallelism; its training mode is restored.
        splits: Name -> tokenized data set.
        batches_of: A split's batches for this process, see :func:`validation_batches`.
        autocast: The context of mixed precision.

    Raises:
        InterruptedRunError: The user asked to stop; between two batches.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), autocast():
            return {name: objective.judge(model, batches_of(data)) for name, data in splits.items()}
    finally:
        model.train(was_training)


def validation_batches(
    data: Any,
    collator: Callable[[list[dict[str, Any]]], dict[str, Tensor]],
    *,
    batch_size: int,
    device: torch.device,
    workers: int = 0,
) -> Iterator[ValidationBatch]:
    """Yield this process's share of a split: every n-th row, in batches.

    All processes yield equally many batches. One that has no rows left yields the first row of
    the split, marked as not its own, because sharded weights need every process in a forward pass.
    No random number of the run is drawn.

    Raises:
        InterruptedRunError: The user asked to stop.
    """
    world_size = distributed.world_size()
    rows = range(distributed.rank(), len(data), world_size)
    longest_share = -(-len(data) // world_size)
    own = [rows[start : start + batch_size] for start in range(0, longest_share, batch_size)]
    loader = iter(
        DataLoader(
            data,
            batch_sampler=[list(batch) or [0] for batch in own],
            collate_fn=collator,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # Workers would otherwise draw from the run's generator.
        )
    )
    for batch_rows in own:
        raise_if_requested("an evaluation batch")
        inputs = {key: value.to(device) for key, value in next(loader).items()}
        yield ValidationBatch(inputs, batch_rows)
