"""Do two models answer alike? Logits on real inputs, compared where it matters."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad_cli.errors import SparsegradError
from sparsegrad_cli.export.merged import auto_class
from sparsegrad_cli.tasks.setup import Setup, first_validation_batches

# Largest difference allowed, as a share of the largest logit. It is some roundings of a number of
# that size: products in another order differ by about a tenth of it through six layers (measured).
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# 8-bit products of bitsandbytes round x to 127 steps a token where the run's did not: up to .05 of
# the largest logit through three blocks of random weights (measured).
_ROUNDED = 2e-1
_SMALLEST = 1e-2  # logits that are nearly all zero are no measure of what made them
# Of a token-level model's logits the last positions of each example are kept: a vocabulary is wide.
_POSITIONS = 16
_ROWS = 8
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class Agreement:
    """How far two models' logits lie apart.

    Attributes:
        difference: largest absolute difference.
        largest: largest absolute logit of the first.
        answers: how many answers there are: examples, or positions of a token-level model.
        same: how many of them are the same class (the largest logit); None for a single score.
    """

    difference: float
    largest: float
    answers: int
    same: int | None


def inputs_of(setup: Setup, count: int) -> list[dict[str, Tensor]]:
    """The first validation rows in batches; of one row where logits are as wide as a vocabulary."""
    wide = auto_class(setup.model) == "AutoModelForCausalLM"
    return first_validation_batches(setup, count, 1 if wide else _ROWS)


@torch.no_grad()
def logits_of(
    model: nn.Module, batches: Sequence[dict[str, Tensor]], autocast: torch.dtype | None = None
) -> list[Tensor]:
    """Per example (positions, classes) or (1, classes), float32 on the CPU.

    Args:
        autocast: compute in this dtype, as training did.
    """
    model.eval()
    rows: list[Tensor] = []
    for batch in batches:
        inputs: dict[str, Any] = {name: t for name, t in batch.items() if name in _INPUTS}
        kind = batch["input_ids"].device.type
        with torch.autocast(kind, autocast) if autocast else nullcontext():
            logits = model(**inputs).logits
        for number, row in enumerate(logits):
            if row.ndim == 2:  # (length, vocabulary): padding says nothing
                row = row[batch["attention_mask"][number].bool()][-_POSITIONS:]
            rows.append(row.reshape(-1, row.shape[-1]).float().cpu())
    return rows


def compare(expected: Sequence[Tensor], got: Sequence[Tensor]) -> Agreement:
    """Compare the logits of the same examples; both as :func:`logits_of` gives them."""
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


def allowed(dtype: torch.dtype, largest: float, *, rounded: bool = False) -> float:
    """The largest difference that rounding explains, for logits up to ``largest``.

    Args:
        rounded: one of the models rounds what goes into its quantized layers, the other does not.
    """
    share = _ROUNDED if rounded else TOLERANCES.get(dtype, TOLERANCES[torch.float32])
    return share * max(_SMALLEST, largest)


def judge(found: Agreement, tolerance: float, *, fix: str) -> None:
    """Refuse logits that lie further apart than ``tolerance``.

    Args:
        fix: what to do about it.

    Raises:
        SparsegradError: they do.
    """
    if found.difference <= tolerance:
        return
    same = "" if found.same is None else f", {found.same} of {found.answers} answers are the same"
    raise SparsegradError(
        f"the exported model does not answer as the trained one: logits differ by up to "
        f"{found.difference:.3g}, {tolerance:.3g} is allowed{same}; nothing was written",
        where="check",
        fix=fix,
    )
