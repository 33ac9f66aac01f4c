"""One optimizer step: forward and backward of its micro-batches, then the update."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sparsegrad_cli import distributed
from sparsegrad_cli.data.order import OrderHash
from sparsegrad_cli.run.launcher import DEEPSPEED
from sparsegrad_cli.tasks.objective import Objective
from sparsegrad_cli.training.accelerator import sharded_by
from sparsegrad_cli.training.divergence import Divergence, MicroBatch
from sparsegrad_cli.training.memory_probe import MemoryProbe
from sparsegrad_cli.training.schedule import StepPlan, make_scheduler


class OptimizerSteps:
    """Take the optimizer steps of a run.

    Args:
        model, optimizer: As accelerate prepared them.
        accelerator: Has prepared them.
        objective: Computes the loss.
        plan: Says which steps there are.
        order: Hashes the batches.
        divergence: Makes the error of a NaN or infinite loss.
        probe: Measures memory in one of the steps, if it can.

    Attributes:
        scheduler: Of the learning rate.
        loss_sum: Sum of this process's losses since it was set to zero, a float32 scalar.
        learning_rate: Of the last step.
        gradient_norm: Before clipping in the last step; None if gradients are not clipped.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        accelerator: Accelerator,
        objective: Objective,
        plan: StepPlan,
        order: OrderHash,
        divergence: Divergence,
        probe: MemoryProbe | None,
    ) -> None:
        self._model, self._optimizer, self._accelerator = model, optimizer, accelerator
        self._objective, self._plan, self._order = objective, plan, order
        self._divergence, self._probe = divergence, probe
        self._deepspeed = sharded_by(accelerator) == DEEPSPEED
        self.scheduler = make_scheduler(optimizer, plan)
        self.loss_sum = torch.zeros((), device=accelerator.device)
        self.learning_rate = 0.0
        self.gradient_norm: float | None = None

    def take(self, step: int, batches: Sequence[dict[str, Tensor]]) -> None:
        """Take optimizer step ``step``, counted from 1, on its micro-batches.

        Raises:
            NonFiniteError: A loss is NaN or infinite; the step is not taken.
        """
        self._model.train()
        items = torch.stack([self._objective.items(batch) for batch in batches]).sum()
        distributed.all_reduce([items])
        for number, inputs in enumerate(batches, start=1):
            self._accelerator.sync_gradients = last = number == len(batches)
            sync = last or self._deepspeed
            with nullcontext() if sync else self._accelerator.no_sync(self._model):
                self.loss_sum += self._backward(
                    MicroBatch(inputs, step, number, len(batches)), items
                )
        limit = self._plan.train.max_grad_norm
        norm = None
        if limit > 0:
            norm = self._accelerator.clip_grad_norm_(self._model.parameters(), limit)
        last_step = step == self._plan.max_steps
        with self._probe.measured_step(last=last_step) if self._probe else nullcontext():
            self._optimizer.step()
        self.learning_rate = float(self.scheduler.get_last_lr()[0])
        self.gradient_norm = None if norm is None else float(norm)
        if not self._accelerator.optimizer_step_was_skipped:
            self.scheduler.step()
        self._model.zero_grad()

    def mean_loss(self, steps: int) -> float:
        """Return the mean loss of the last ``steps`` steps over all processes; reset the sum."""
        total = self.loss_sum.clone()
        distributed.all_reduce([total])
        self.loss_sum.zero_()
        return float(total) / distributed.world_size() / steps

    def _backward(self, batch: MicroBatch, items: Tensor) -> Tensor:
        """Add the gradients of one micro-batch; return its part of the step's loss.

        Every item of a step has the same weight, in whatever micro-batch and process it lies:
        gradients are averaged over processes, hence the factor ``world_size``.

        Args:
            batch: On the model's device.
            items: Labelled tokens or rows of the step, in all processes.
        """
        objective, world_size = self._objective, distributed.world_size()
        inputs: Any = batch.inputs
        self._order.add(inputs)
        with self._accelerator.autocast():
            if objective.by_token:
                draw = (batch.step, batch.number)
                loss = objective.loss(self._model, inputs, items, draw) * world_size
            else:
                share = int(objective.items(inputs)) * batch.count * world_size / int(items)
                loss = objective.loss(self._model, inputs)
                loss = (loss if share == 1 else loss * share) / batch.count
        # The engine would divide once more.
        options = {"scale_wrt_gas": False} if self._deepspeed else {}
        self._accelerator.backward(loss, **options)
        loss = loss.detach()
        # Gradients are summed over processes, so the step is lost in all of them.
        if distributed.any(not bool(torch.isfinite(loss))):
            rate = float(self.scheduler.get_last_lr()[0])
            raise self._divergence.error(batch, float(loss), rate)
        return loss
