"""Run a training step or an evaluation again with another batch size, after memory ran out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsegrad_cli.data.batches import longest_batch
from sparsegrad_cli.memory.out_of_memory import (
    EVAL_KEY,
    TRAIN_KEY,
    Attempt,
    Phase,
    Trial,
    attempt,
)
from sparsegrad_cli.recipe.schema import TrainSection
from sparsegrad_cli.tasks.setup import Setup, to_device

_ACCUMULATION = 2  # batches per step: the gradients of the first are alive while the second runs
_STEPS = 2  # the optimizer's state is alive in the second


def training_trials(
    setup: Setup,
    train: TrainSection,
    loss_of: Callable[[Mapping[str, Tensor]], Tensor],
    optimizer: torch.optim.Optimizer,
    bases: Sequence[Tensor],
) -> dict[str, Trial]:
    """Return how to try ``train`` and ``evaluate`` with other batch sizes.

    Args:
        setup: model and data.
        train: the recipe's section.
        loss_of: computes the loss of a batch with the run's mixed precision.
        optimizer: the method's.
        bases: tensors that count as bases.
    """
    model = setup.model

    def batch_of(data: Any, size: int) -> dict[str, Tensor]:
        return to_device(setup.collator(longest_batch(data, size)), setup.device)

    def try_step(size: int) -> Attempt:
        batch = batch_of(setup.train_data, size)
        meter = setup.new_meter()
        meter.watch(model, bases=bases, optimizer=optimizer)

        def work(phase: Phase) -> None:
            model.train()
            for _ in range(_STEPS):
                for _ in range(_ACCUMULATION):
                    with phase("forward"):
                        loss = loss_of(batch)
                    with phase("backward"):
                        loss.backward()
                    del loss
                with phase("optimizer"):
                    optimizer.step()
                model.zero_grad(set_to_none=True)

        found = attempt(model, meter, work)
        model.zero_grad(set_to_none=True)
        return found

    def try_evaluation(size: int) -> Attempt:
        batch = batch_of(max(setup.validation.values(), key=len), size)
        meter = setup.new_meter()
        meter.watch(model, bases=bases)

        def work(phase: Phase) -> None:
            model.eval()
            with torch.no_grad(), phase("evaluate"):
                loss_of(batch)

        return attempt(model, meter, work)

    rows, most = len(setup.train_data), max(map(len, setup.validation.values()))
    return {
        "train": Trial(TRAIN_KEY, min(train.per_device_train_batch_size, rows), try_step),
        "evaluate": Trial(EVAL_KEY, min(train.per_device_eval_batch_size, most), try_evaluation),
    }
