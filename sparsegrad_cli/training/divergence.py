"""The error of a training loss that is NaN or infinite: where it happened, and in which module."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sparsegrad_cli import distributed
from sparsegrad_cli.errors import NonFiniteError
from sparsegrad_cli.models.nan_check import INPUTS, first_non_finite
from sparsegrad_cli.run.checkpoints import Checkpoints
from sparsegrad_cli.tasks.setup import Setup
from sparsegrad_cli.training.loaders import TrainingBatches
from sparsegrad_cli.training.schedule import StepPlan


@dataclass(frozen=True)
class MicroBatch:
    """A batch of an optimizer step.

    Attributes:
        inputs: What the model is given.
        step: The optimizer step, from 1.
        number: The batch's number in the step, from 1.
        count: Micro-batches of the step.
    """

    inputs: Mapping[str, Tensor]
    step: int
    number: int
    count: int


@dataclass(frozen=True)
class Divergence:
    """Make the error of a run whose loss is NaN or infinite in some process.

    Attributes:
        setup: Model and data.
        plan: The steps of the run.
        batches: The batches of the run.
        checkpoints: The checkpoints of the run.
        loss: Computes the loss of a batch again.
        sharded: Whether each process holds a part of the weights.
    """

    setup: Setup
    plan: StepPlan
    batches: TrainingBatches
    checkpoints: Checkpoints
    loss: Callable[[Mapping[str, Tensor]], Tensor]
    sharded: bool

    def error(self, batch: MicroBatch, loss: float, learning_rate: float) -> NonFiniteError:
        """Return the error of this process. All processes have to call it.

        Args:
            batch: The batch of this process.
            loss: Its loss, which may be finite.
            learning_rate: Of this step.
        """
        advice = (
            f"lower train.learning_rate (now {learning_rate:g}), warm up "
            "(train.warmup_steps: 0.06) or clip (train.max_grad_norm: 1)"
        )
        lost, module = not math.isfinite(loss), None
        if lost or self.sharded:  # Sharded weights need every process to look for the module.
            self.setup.model.zero_grad(set_to_none=True)
            module = first_non_finite(self.setup.model, partial(self.loss, batch.inputs))
        if lost:
            return self._own_error(batch, loss, module, advice)
        return NonFiniteError(
            f"the training loss of another process is NaN or infinite at step {batch.step}: "
            "training has diverged",
            where=f"step {batch.step}; that process names the module",
            fix=advice,
            details={"step": batch.step},
        )

    def _own_error(
        self, batch: MicroBatch, loss: float, module: str | None, advice: str
    ) -> NonFiniteError:
        rows, newest = self._rows(batch), self.checkpoints.newest
        checkpoint = newest.name if newest else None
        where = f"step {batch.step}"
        if batch.count > 1:
            where += f", batch {batch.number} of {batch.count}"
        if rows:
            where += f", rows {', '.join(map(str, rows))} of the training data"
        found = f"first not finite: {module}" if module else "run again, all modules are finite"
        return NonFiniteError(
            f"the training loss is {loss} at step {batch.step}: training has diverged",
            where=where,
            fix="look at these rows" if module == INPUTS else advice,
            more=[found, f"last good checkpoint: {checkpoint or 'none was saved yet'}"],
            details={
                "step": batch.step,
                "batch": batch.number,
                "rows": rows,
                "module": module,
                "checkpoint": checkpoint,
            },
        )

    def _rows(self, batch: MicroBatch) -> list[int] | None:
        """Return the batch's rows of the training data, if collating them gives the same tensors.

        With several processes they are unknown.
        """
        if distributed.world_size() > 1:
            return None
        rows = self.batches.rows_of((batch.step - 1) % self.plan.steps_per_epoch, batch.number - 1)
        if not rows:
            return None
        made = self.setup.collator([self.setup.train_data[row] for row in rows])
        same = all(
            torch.equal(value, batch.inputs[name].cpu())
            for name, value in made.items()
            if isinstance(value, Tensor)
        )
        return rows if same else None
