"""Which optimizer steps a run takes, and what is due after each of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from sparsegrad_cli import distributed
from sparsegrad_cli.recipe.schema import TrainSection


@dataclass(frozen=True)
class StepPlan:
    """The steps of a run, by the keys of ``train:``, with the meaning of TrainingArguments.

    Attributes:
        train: The section.
        batches_per_epoch: Of each process; the last one may be smaller.
    """

    train: TrainSection
    batches_per_epoch: int

    @classmethod
    def of(cls, train: TrainSection, rows: int) -> StepPlan:
        """Plan for ``rows`` of training data shared by all processes."""
        batches = math.ceil(rows / train.per_device_train_batch_size)
        return cls(train, math.ceil(batches / distributed.world_size()))

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch; the last one may have fewer micro-batches."""
        return math.ceil(self.batches_per_epoch / self.train.gradient_accumulation_steps)

    @property
    def max_steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.train.max_steps > 0:
            return self.train.max_steps
        return math.ceil(self.train.num_train_epochs * self.steps_per_epoch)

    def epoch_after(self, step: int) -> float:
        """Return how many epochs have passed after a step."""
        epochs, steps = divmod(step, self.steps_per_epoch)
        batches = steps * self.train.gradient_accumulation_steps
        return epochs + batches / self.batches_per_epoch

    def ends_epoch(self, step: int) -> bool:
        """Whether an epoch, or the run, ends with this step."""
        return step % self.steps_per_epoch == 0 or step == self.max_steps

    def logs_after(self, step: int) -> bool:
        """Whether the training loss is logged after this step."""
        return step % self.train.logging_steps == 0

    def evaluates_after(self, step: int) -> bool:
        """Whether the model is evaluated after this step."""
        strategy, every = self.train.eval_strategy, self.train.eval_steps
        if strategy == "steps" and every:
            return step % every == 0 or step == self.max_steps
        return strategy == "epoch" and self.ends_epoch(step)

    def saves_after(self, step: int) -> bool:
        """Whether a checkpoint is due after this step, whatever its evaluation says."""
        strategy = self.save_strategy
        if strategy == "steps":
            every = self.train.save_steps or self.train.eval_steps or 500
            return step % every == 0 or step == self.max_steps
        return strategy == "epoch" and self.ends_epoch(step)

    @property
    def save_strategy(self) -> str:
        """``save_strategy``, which follows ``eval_strategy`` by default."""
        return self.train.save_strategy or self.train.eval_strategy

    @property
    def keeps_best(self) -> bool:
        """Whether the run ends with its best checkpoint instead of its last weights."""
        possible = "no" not in (self.train.eval_strategy, self.save_strategy)
        return self.train.load_best_model_at_end and possible


def make_scheduler(optimizer: torch.optim.Optimizer, plan: StepPlan) -> Any:
    """Return transformers' learning-rate scheduler of a run."""
    from transformers import get_scheduler

    warmup = plan.train.warmup_steps
    return get_scheduler(
        plan.train.lr_scheduler_type,
        optimizer,
        num_warmup_steps=math.ceil(plan.max_steps * warmup) if warmup < 1 else int(warmup),
        num_training_steps=plan.max_steps,
    )
