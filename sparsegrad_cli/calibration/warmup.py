"""Train the head alone for a few steps before calibration.

The gradients that a new head sends back into the model are only that head's noise. During the
warm-up only the head learns. The body runs forward once per batch, without dropout; its outputs are
kept, and the steps go round them. A step then costs what the head costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from sparsegrad_cli.calibration.gradients import (
    Batch,
    as_in_training,
    frozen_for_a_while,
    gradient_step,
)
from sparsegrad_cli.interruption import raise_if_requested
from sparsegrad_cli.models.precision import HALF
from sparsegrad_cli.models.targets import head_parameters
from sparsegrad_cli.numerics.seeding import temporary_seed
from sparsegrad_cli.recipe.schema import TrainSection

WARMUP_BATCHES = 6
"""Batches of calibration that the steps go round, at most: their outputs are kept."""


@contextmanager
def warmed_head(
    model: nn.Module,
    batches: Callable[[], Sequence[Batch]],
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    keep: bool = False,
    train: TrainSection | None = None,
    meter: Callable[[], AbstractContextManager[Any]] = nullcontext,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Iterator[None]:
    """Train the head for ``steps``, and restore it when the context ends.

    Args:
        model: any model whose output has ``loss``.
        batches: returns the batches, on the model's device; called if there is a head to train.
        steps: number of steps, which go round the batches; 0 trains nothing.
        learning_rate: constant learning rate of AdamW.
        seed: seed for models that draw random numbers even without dropout; the global random state
            is restored.
        keep: keep the trained head when the context ends.
        train: settings of gradient checkpointing and autocast; None for neither.
        meter: context in which the first two steps and the last forward pass are measured.
        on_step: called with the number and loss of each step.

    Raises:
        SparsegradError: a loss is not finite; the head is restored.
    """
    head = list(head_parameters(model).values()) if steps else []
    before = [parameter.detach().clone() for parameter in head]
    warm = False
    try:
        if head:
            with as_in_training(model, train) as scale:
                _train(model, head, batches(), steps, learning_rate, seed, scale, meter, on_step)
        warm = True
        yield
    finally:
        if not (keep and warm):
            with torch.no_grad():
                for parameter, value in zip(head, before, strict=True):
                    parameter.copy_(value)


def _train(
    model: nn.Module,
    head: list[nn.Parameter],
    batches: Sequence[Batch],
    steps: int,
    learning_rate: float,
    seed: int,
    scale: float,
    meter: Callable[[], AbstractContextManager[Any]],
    on_step: Callable[[int, float], None],
) -> None:
    # AdamW does not work in half precision: in float16, eps is 0 and the second moment underflows.
    masters = [p.detach().float() if p.dtype in HALF else p for p in head]
    optimizer = torch.optim.AdamW(masters, lr=learning_rate, weight_decay=0.0)
    with frozen_for_a_while(model), temporary_seed(seed):
        # Dropout in a frozen body would only add noise. Fifty steps are too few to overfit.
        model.eval()
        for parameter in head:
            parameter.requires_grad_(True)
        with _KeptOutputs(model) as outputs:
            for step in range(1, steps + 1):
                number = (step - 1) % len(batches)
                raise_if_requested(f"warm-up step {step}")
                outputs.begin(number)
                # In the last forward pass, the outputs of all other batches are kept.
                with meter() if step <= 2 or step == len(batches) else nullcontext():
                    loss = gradient_step(model, batches[number], step, scale=scale)
                    _step(optimizer, head, masters, scale)
                on_step(step, loss)


def _step(
    optimizer: torch.optim.Optimizer,
    head: list[nn.Parameter],
    masters: list[torch.Tensor],
    scale: float,
) -> None:
    """Take one step in float32, and round it into parameters of half precision."""
    for parameter, master in zip(head, masters, strict=True):
        if master is not parameter and parameter.grad is not None:
            master.grad, parameter.grad = parameter.grad.float(), None
        if master.grad is not None and scale != 1.0:
            master.grad /= scale
    optimizer.step()
    with torch.no_grad():
        for parameter, master in zip(head, masters, strict=True):
            if master is not parameter:
                parameter.copy_(master)
    optimizer.zero_grad(set_to_none=True)


class _KeptOutputs:
    """Replace the forward of a model's body: it runs once per batch, and its outputs are kept.

    The body is frozen and in evaluation mode, so it would give the same outputs again.
    """

    def __init__(self, model: nn.Module) -> None:
        self._body: Any = getattr(model, str(model.base_model_prefix))
        self._own = vars(self._body).get("forward")
        self._forward = self._body.forward
        self._kept: dict[int, list[Any]] = {}
        self._of_batch: list[Any] = []
        self._used = 0

    def __enter__(self) -> _KeptOutputs:
        self._body.forward = self._run
        return self

    def __exit__(self, *error: object) -> None:
        del self._body.forward
        if self._own is not None:
            self._body.forward = self._own

    def begin(self, batch_number: int) -> None:
        """Use the outputs of this batch from now on, or compute them."""
        self._of_batch, self._used = self._kept.setdefault(batch_number, []), 0

    def _run(self, *inputs: Any, **named: Any) -> Any:
        if self._used == len(self._of_batch):
            with torch.no_grad():
                self._of_batch.append(self._forward(*inputs, **named))
        self._used += 1
        return self._of_batch[self._used - 1]
