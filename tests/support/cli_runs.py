"""Recipe overrides for runs of a few seconds, and the outcome of a command."""

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

# Command-line overrides that select each method and form.
METHODS = {
    "full": ("method=full",),
    "lora": ("method=lora",),
    "meprop": ("method=meprop",),
    "sparsegrad": ("method.form=materialized",),
    "core": ("method.rank=64",),
}


@dataclass
class Outcome:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str

    @property
    def flat(self) -> str:
        """Return stderr without panel borders and line breaks."""
        return " ".join(self.err.replace("│", " ").split())


Cli = Callable[..., Outcome]
