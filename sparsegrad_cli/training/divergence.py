"""The error of a training loss that is NaN or infinite: where it happened, and in which module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad_cli.errors import NonFiniteError
from sparsegrad_cli.models.nan_check import INPUTS, first_non_finite


@dataclass(frozen=True)
class MicroBatch:
    """A batch of a step, and what is needed to name its rows.

    Attributes:
        inputs: What the model was given.
        step: The optimizer step, from 1.
        number: The batch's number in the step, from 1.
        count: Micro-batches of the step.
        rows: Rows of the training data that it should hold; empty where that is not known.
    """

    inputs: Mapping[str, Tensor]
    step: int
    number: int
    count: int
    rows: Sequence[int]

    def proven_rows(self, data: Any, collator: Callable[[list[Any]], Any]) -> list[int] | None:
        """Return the rows if collating them again gives the same tensors."""
        if not self.rows:
            return None
        made = collator([data[row] for row in self.rows])
        same = all(
            torch.equal(value, self.inputs[name].cpu())
            for name, value in made.items()
            if isinstance(value, Tensor)
        )
        return list(self.rows) if same else None


def diverged(
    batch: MicroBatch,
    loss: float,
    rows: list[int] | None,
    model: nn.Module,
    forward: Callable[[], Tensor],
    *,
    learning_rate: float,
    checkpoint: str | None,
) -> NonFiniteError:
    """Return the error for a loss that is NaN or infinite.

    Args:
        batch: Where it happened.
        loss: The loss.
        rows: Of the training data, if known.
        model: Is run again to find the first module whose output is not finite.
        forward: Runs it and returns the loss.
        learning_rate: Of this step.
        checkpoint: Name of the last good one.
    """
    model.zero_grad(set_to_none=True)
    module = first_non_finite(model, forward)
    where = f"step {batch.step}"
    if batch.count > 1:
        where += f", batch {batch.number} of {batch.count}"
    if rows:
        where += f", rows {', '.join(map(str, rows))} of the training data"
    found = f"first not finite: {module}" if module else "run again, all modules are finite"
    return NonFiniteError(
        f"the training loss is {loss} at step {batch.step}: training has diverged",
        where=where,
        fix="look at these rows" if module == INPUTS else _advice(learning_rate),
        more=[found, f"last good checkpoint: {checkpoint or 'none was saved yet'}"],
        details={
            "step": batch.step,
            "batch": batch.number,
            "rows": rows,
            "module": module,
            "checkpoint": checkpoint,
        },
    )


def diverged_elsewhere(step: int, learning_rate: float) -> NonFiniteError:
    """Return the error of the processes whose own loss was finite."""
    return NonFiniteError(
        f"the training loss of another process is NaN or infinite at step {step}: training has "
        "diverged",
        where=f"step {step}; that process names the module",
        fix=_advice(learning_rate),
        details={"step": step},
    )


def _advice(learning_rate: float) -> str:
    return (
        f"lower train.learning_rate (now {learning_rate:g}), warm up "
        "(train.warmup_steps: 0.06) or clip (train.max_grad_norm: 1)"
    )
