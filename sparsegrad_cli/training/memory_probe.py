"""The memory of one training step, measured phase by phase on the longest examples of the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sparsegrad_cli import interruption
from sparsegrad_cli.data.batches import longest_batch
from sparsegrad_cli.numerics.seeding import temporary_seed
from sparsegrad_cli.recipe.schema import Recipe
from sparsegrad_cli.tasks.setup import Setup, to_device


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
        batch = self._longest(self._setup.train_data, train.per_device_train_batch_size)
        self.batch_shape = list(batch["input_ids"].shape)
        if interruption.requested():
            return  # The run ends after this step; what was not measured stays unknown.
        model = self._setup.model
        with temporary_seed(self._recipe.seed):
            model.train()
            if train.gradient_accumulation_steps > 1:  # A later micro-batch: gradients exist.
                one = longest_batch(self._setup.train_data, 1)
                self._loss(to_device(self._setup.collator(one), self._setup.device)).backward()
            with self._meter.phase("forward"):
                loss = self._loss(batch)
            with self._meter.phase("backward"):
                loss.backward()
        del loss, batch
        model.zero_grad(set_to_none=True)
        validation = next(iter(self._setup.validation.values()))
        batch = self._longest(validation, train.per_device_eval_batch_size)
        model.eval()
        with torch.no_grad(), self._meter.phase("evaluate"):
            self._loss(batch)
        model.train()

    def _longest(self, data: Any, size: int) -> dict[str, Tensor]:
        return to_device(self._setup.collator(longest_batch(data, size)), self._setup.device)
