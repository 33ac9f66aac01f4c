"""The memory of a step on the longest examples of the data.

A run measures it phase by phase. After memory ran out, it is tried with other batch sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sparsegrad_cli import interruption
from sparsegrad_cli.data.batches import longest_batch
from sparsegrad_cli.memory.out_of_memory import (
    EVAL_KEY,
    TRAIN_KEY,
    Attempt,
    Phase,
    Trial,
    attempt,
)
from sparsegrad_cli.numerics.seeding import temporary_seed
from sparsegrad_cli.recipe.schema import Recipe, TrainSection
from sparsegrad_cli.tasks.setup import Setup, to_device

_ACCUMULATION = 2  # batches per step: the gradients of the first are alive while the second runs
_STEPS = 2  # the optimizer's state is alive in the second


class MemoryProbe:
    """Measure memory once, in the second step, when optimizer state exists.

    The optimizer is measured in that step. Forward, backward and evaluation are measured right
    after it, on the longest examples of the data: the worst case of dynamic padding. The gradients
    of that extra pass are dropped and the random state is restored, so it does not change the run.

    Args:
        setup: Model, data and the meter.
        recipe: Batch sizes and seed.
        loss: Computes the loss of a batch, with the run's mixed precision.

    Attributes:
        batch_shape: Examples x tokens of the measured batch, once it is measured.
    """

    def __init__(
        self,
        setup: Setup,
        recipe: Recipe,
        loss: Callable[[Mapping[str, Tensor]], Tensor],
    ) -> None:
        self._setup, self._recipe, self._loss = setup, recipe, loss
        self._meter = setup.meter
        self._steps, self._due = 0, True
        self.batch_shape: list[int] | None = None

    @contextmanager
    def measured_step(self, *, last: bool) -> Iterator[None]:
        """Wrap one optimizer step, and measure in it if it is the one.

        Args:
            last: No other step follows.
        """
        self._steps += 1
        if not self._due or not (self._steps == 2 or last):
            yield
            return
        with self._meter.phase("optimizer"):
            yield

    def after_step(self, *, last: bool) -> None:
        """Measure the other phases, once gradients are dropped after the measured step."""
        if not self._due or not (self._steps == 2 or last):
            return
        self._due = False
        train = self._recipe.train
        batch = _longest(self._setup, self._setup.train_data, train.per_device_train_batch_size)
        self.batch_shape = list(batch["input_ids"].shape)
        if interruption.requested():
            return  # The run ends after this step; what was not measured stays unknown.
        model = self._setup.model
        with temporary_seed(self._recipe.seed):
            model.train()
            if train.gradient_accumulation_steps > 1:  # A later micro-batch: gradients exist.
                self._loss(_longest(self._setup, self._setup.train_data, 1)).backward()
            with self._meter.phase("forward"):
                loss = self._loss(batch)
            with self._meter.phase("backward"):
                loss.backward()
        del loss, batch
        model.zero_grad(set_to_none=True)
        validation = next(iter(self._setup.validation.values()))
        batch = _longest(self._setup, validation, train.per_device_eval_batch_size)
        model.eval()
        with torch.no_grad(), self._meter.phase("evaluate"):
            self._loss(batch)
        model.train()


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

    def try_step(size: int) -> Attempt:
        batch = _longest(setup, setup.train_data, size)
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
        batch = _longest(setup, max(setup.validation.values(), key=len), size)
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


def _longest(setup: Setup, data: Any, size: int) -> dict[str, Tensor]:
    """Return the ``size`` longest examples of a data set as a batch."""
    return to_device(setup.collator(longest_batch(data, size)), setup.device)
