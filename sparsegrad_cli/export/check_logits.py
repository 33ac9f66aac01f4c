"""Compare the logits of an export with those of its run, on validation rows."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad_cli.errors import SparsegradError
from sparsegrad_cli.export.base_model import LANGUAGE_MODEL, auto_class
from sparsegrad_cli.tasks.setup import Setup, first_validation_batches

# Largest difference allowed, as a share of the largest logit: a few roundings of a number of that
# size. If products are computed in another order, logits differ by a tenth of this limit after six
# layers (measured).
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# bitsandbytes rounds the inputs of 8-bit products to 127 steps per token. If the run did not, the
# logits differ by up to 0.05 of the largest one after three blocks of random weights (measured).
_TOLERANCE_ROUNDED = 2e-1
_SMALLEST_LOGIT = 1e-2  # Below this, a share of the largest logit is not meaningful.
_POSITIONS = 16  # Last positions of each example whose logits are kept for a language model.
_ROWS = 8
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class Agreement:
    """How far the logits of two models differ.

    Attributes:
        difference: Largest absolute difference.
        largest: Largest absolute logit of the first model.
        answers: Number of predictions: examples, or positions for a language model.
        same: Number of predictions with the same most likely class; None for a single score.
    """

    difference: float
    largest: float
    answers: int
    same: int | None


def check_batches(setup: Setup, count: int) -> list[dict[str, Tensor]]:
    """Return the first ``count`` validation rows in batches, of one row for a language model."""
    rows = 1 if auto_class(setup.model) == LANGUAGE_MODEL else _ROWS
    return first_validation_batches(setup, count, rows)


@torch.no_grad()
def logits_of(
    model: nn.Module, batches: Sequence[dict[str, Tensor]], autocast: torch.dtype | None = None
) -> list[Tensor]:
    """Compute the logits of every example.

    Args:
        model: The model, which is set to eval mode.
        batches: See :func:`check_batches`.
        autocast: The dtype to compute in, as in training.

    Returns:
        (positions, vocabulary) or (1, classes) per example, float32 on the CPU.
    """
    model.eval()
    rows: list[Tensor] = []
    for batch in batches:
        inputs: dict[str, Any] = {name: t for name, t in batch.items() if name in _INPUTS}
        kind = batch["input_ids"].device.type
        with torch.autocast(kind, autocast) if autocast else nullcontext():
            logits = model(**inputs).logits
        for number, row in enumerate(logits):
            if row.ndim == 2:  # (length, vocabulary), without the padding
                row = row[batch["attention_mask"][number].bool()][-_POSITIONS:]
            rows.append(row.reshape(-1, row.shape[-1]).float().cpu())
    return rows


def compare(expected: Sequence[Tensor], got: Sequence[Tensor]) -> Agreement:
    """Compare the logits of the same examples, as :func:`logits_of` returns them."""
    difference, largest, answers, same = 0.0, 0.0, 0, 0
    for one, other in zip(expected, got, strict=True):
        if one.shape != other.shape:
            return Agreement(float("inf"), float(one.abs().max()), len(one), 0)
        gap = float((one - other).abs().max())
        difference = max(difference, gap if gap == gap else float("inf"))
        largest = max(largest, float(one.abs().max()))
        answers += len(one)
        same += int((one.argmax(-1) == other.argmax(-1)).sum())
    single = bool(expected) and expected[0].shape[-1] == 1
    return Agreement(difference, largest, answers, None if single else same)


def tolerance_for(dtype: torch.dtype, largest: float, *, rounded: bool = False) -> float:
    """Return the largest difference that rounding explains.

    Args:
        dtype: The dtype of the weights.
        largest: Largest absolute logit.
        rounded: Whether only one of the models rounds the inputs of its quantized layers.
    """
    share = _TOLERANCE_ROUNDED if rounded else TOLERANCES.get(dtype, TOLERANCES[torch.float32])
    return share * max(_SMALLEST_LOGIT, largest)


def check_agreement(found: Agreement, tolerance: float, *, fix: str) -> None:
    """Refuse logits that differ by more than ``tolerance``.

    Args:
        found: The comparison.
        tolerance: Largest absolute difference allowed.
        fix: The advice in the error.

    Raises:
        SparsegradError: They differ by more.
    """
    if found.difference <= tolerance:
        return
    same = "" if found.same is None else f"; {found.same} of {found.answers} answers are the same"
    raise SparsegradError(
        f"the exported model does not compute what the trained one computes: expected logits that "
        f"differ by at most {tolerance:.3g}, got {found.difference:.3g}{same}; nothing was written",
        where="check",
        fix=fix,
    )
