"""A run small enough for seconds: a real model, real steps, few of them; and what a user sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

SMALL = (
    "task.train_limit=96",
    "task.eval_limit=48",
    "task.max_length=32",
    "train.per_device_train_batch_size=8",
    "train.max_steps=6",
    "train.eval_strategy=steps",
    "train.eval_steps=3",
    "train.logging_steps=2",
    "calibration.steps=3",
    "calibration.energy_steps=1",
    "calibration.basis_per=kind",
)

# What a user types for each method and form.
METHODS = {
    "full": ("method=full",),
    "lora": ("method=lora",),
    "meprop": ("method=meprop",),
    "sparsegrad": ("method.form=materialized",),
    "core": ("method.rank=64",),
}


@dataclass
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def flat(self) -> str:
        """stderr with the panel's borders and line breaks taken out."""
        return " ".join(self.err.replace("│", " ").split())


Cli = Callable[..., Outcome]
