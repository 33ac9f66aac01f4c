"""What is tried when memory has run out: the work of each phase, with a batch of another size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sparsegrad_cli.data.collate import longest_batch
from sparsegrad_cli.memory.meter import make_meter
from sparsegrad_cli.models.quantized import quantization_state
from sparsegrad_cli.tasks.setup import Setup, to_device
from sparsegrad_cli.training.oom_measure import Attempt, Phase, attempt

_ROUNDS = 2  # of accumulation: gradients of the first are there while the second runs


@dataclass
class Situation:
    """What a session knows when memory runs out.

    Attributes:
        at: ``load``, ``calibrate``, ``prepare``, ``train`` or ``evaluate``.
        setup: model and data, once loaded.
        bases: tensors to book as bases.
        trainer: once made.
        calibrate: calibration of one step with batches of a size.
        calibration_batch: that size as it was.
    """

    at: str = "load"
    setup: Setup | None = None
    bases: tuple[torch.Tensor, ...] = ()
    trainer: Any = None
    calibrate: Callable[[int], Any] | None = None
    calibration_batch: int = 0


def training(setup: Setup, known: Situation) -> Callable[[int], Attempt]:
    """Two optimizer steps of two batches each: with state, and with gradients kept meanwhile."""
    model, trainer = setup.model, known.trainer
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)

    def try_size(size: int) -> Attempt:
        rows = longest_batch(setup.train_data, size)
        batch = to_device(setup.collator(rows), setup.device)
        meter = make_meter(setup.device)
        meter.watch(
            model,
            weights=quantization_state(model),
            bases=known.bases,
            optimizer=optimizer,
        )

        def work(phase: Phase) -> None:
            model.train()
            for number in range(2 * _ROUNDS):
                with phase("forward"), trainer.compute_loss_context_manager():
                    loss = trainer.compute_loss(model, dict(batch))
                with phase("backward"):
                    loss.backward()
                del loss
                if number % _ROUNDS == _ROUNDS - 1:
                    with phase("optimizer"):
                        optimizer.step()
                    model.zero_grad(set_to_none=True)

        found = attempt(model, meter, work)
        model.zero_grad(set_to_none=True)
        return found

    return try_size


def evaluating(setup: Setup, known: Situation) -> Callable[[int], Attempt]:
    """One batch of the longest validation rows, forward only."""
    model, trainer = setup.model, known.trainer

    def try_size(size: int) -> Attempt:
        rows = longest_batch(max(setup.validation.values(), key=len), size)
        batch = to_device(setup.collator(rows), setup.device)
        meter = make_meter(setup.device)
        meter.watch(model, weights=quantization_state(model), bases=known.bases)

        def work(phase: Phase) -> None:
            model.eval()
            with torch.no_grad(), phase("evaluate"), trainer.compute_loss_context_manager():
                trainer.compute_loss(model, dict(batch))

        return attempt(model, meter, work)

    return try_size


def calibrating(setup: Setup, calibrate: Callable[[int], Any]) -> Callable[[int], Attempt]:
    """One gradient step and what is made of it."""

    def try_size(size: int) -> Attempt:
        meter = make_meter(setup.device)
        meter.watch(setup.model, weights=quantization_state(setup.model))

        def work(phase: Phase) -> None:
            with phase("calibrate"):
                calibrate(size)

        return attempt(setup.model, meter, work)

    return try_size
