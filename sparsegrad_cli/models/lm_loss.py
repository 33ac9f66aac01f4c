"""The loss of a causal language model, with logits computed for labelled tokens only.

A batch holds ``input_ids``, ``labels`` (-100 for tokens without a label), ``position_ids`` and,
unless it is packed, ``attention_mask``; each (batch, length). Position t predicts the label of
t + 1.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sparsegrad_cli.data.batches import UNLABELLED
from sparsegrad_cli.errors import DataError, UsageError
from sparsegrad_cli.models.lm_head import LmHead, find_lm_head, logits_of, states_of
from sparsegrad_cli.models.sampled_loss import Draw, SampledLoss
from sparsegrad_cli.models.sharded_tensors import call_as_forward
from sparsegrad_cli.numerics.core_linear import product_dtype
from sparsegrad_cli.numerics.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_sums,
)

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class LmSums:
    """Sums over the labelled tokens of an evaluation.

    Attributes:
        loss: Sum of -log p(token).
        tokens: Number of labelled tokens.
        correct: Number of labelled tokens that have the highest logit.
    """

    loss: float = 0.0
    tokens: int = 0
    correct: int = 0

    def __add__(self, other: LmSums) -> LmSums:
        return LmSums(
            self.loss + other.loss, self.tokens + other.tokens, self.correct + other.correct
        )


def lm_loss(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    normalizer: float | Tensor,
    *,
    head: LmHead | None = None,
    cross_entropy: Callable[..., Tensor] = linear_cross_entropy,
) -> Tensor:
    """Return the sum of -log p over a batch's labelled tokens, divided by the normalizer.

    If the normalizer is the number of labelled tokens of a whole optimizer step, every token has
    the same weight, however the step is divided into micro-batches.

    Args:
        model: A transformers model that is not wrapped by DistributedDataParallel, which
            synchronizes gradients around ``model.forward`` only; see :func:`use_lm_loss`.
        batch: See the module's docstring; other tensors are passed on to the model.
        normalizer: The divisor, a number or a scalar tensor.
        head: The result of :func:`find_lm_head`; found by a forward pass of eight tokens if None.
        cross_entropy: Computes the sum from hidden states and head, if ``head`` allows it.

    Returns:
        A scalar in float32 (float64 for a float64 model).

    Raises:
        DataError: The batch has no labelled token.
    """
    head = head or find_lm_head(model)
    states_MI, target_M = _labelled(model, batch, head)
    return _cross_entropy(model, states_MI, target_M, head, cross_entropy) / normalizer


@torch.no_grad()
def lm_sums(model: nn.Module, batch: Mapping[str, Tensor], *, head: LmHead | None = None) -> LmSums:
    """Return the loss and the numbers of labelled and correct tokens of a batch.

    Call ``model.eval()`` before an evaluation. Arguments and errors are those of :func:`lm_loss`.
    """
    head = head or find_lm_head(model)
    states_MI, target_M = _labelled(model, batch, head)
    if head.reason is None:
        loss, correct = _at_head(model, states_MI, linear_cross_entropy_sums, target_M, head)
    else:
        loss = _cross_entropy(model, states_MI, target_M, head)
        correct = (states_MI.argmax(1) == target_M).sum()
    return LmSums(float(loss), len(target_M), int(correct))


def use_lm_loss(model: nn.Module, sampled: SampledLoss | None = None) -> LmHead:
    """Let the model's own forward compute this loss if it is given labels.

    ``model(**batch)`` then returns the loss but no logits. The normalizer is the argument
    ``num_items_in_batch`` (as in transformers' Trainer), or the number of the batch's labelled
    tokens. The loss is thereby computed inside DistributedDataParallel, which synchronizes
    gradients only for what its forward computes.

    Args:
        model: A transformers model.
        sampled: The loss where the argument ``loss_draw`` names a place in training; without that
            argument, as in calibration, the full loss is computed.

    Returns:
        How the logits are computed; its ``reason`` says why all logits must be computed, if so.

    Raises:
        UsageError: A sampled loss is wanted, but all logits must be computed.
    """
    head = find_lm_head(model)
    if sampled is not None and head.reason is not None:
        raise UsageError(
            f"{sampled.name} needs the hidden states before a linear head, and "
            f"{type(model).__name__} computes all logits: {head.reason}",
            where="train.loss",
            fix="use train.loss: full",
        )
    # Set on the instance: a change on the class would reach other models.
    model.forward = functools.partial(_forward, model, model.forward, head, sampled)
    return head


def _forward(
    model: nn.Module,
    plain: Callable[..., Any],
    head: LmHead,
    sampled: SampledLoss | None,
    *positional: Any,
    labels: Tensor | None = None,
    num_items_in_batch: float | Tensor | None = None,
    loss_draw: Draw | None = None,
    **inputs: Any,
) -> Any:
    """Run the forward of a model after :func:`use_lm_loss`."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    if labels is None:
        return plain(*positional, **inputs)
    names = inspect.signature(plain).parameters
    batch = {**dict(zip(names, positional, strict=False)), **inputs, "labels": labels}
    normalizer = num_items_in_batch
    if normalizer is None:
        normalizer = (labels[:, 1:] != UNLABELLED).sum()
    compute: Callable[..., Tensor] = linear_cross_entropy
    if sampled is not None and loss_draw is not None:
        compute = functools.partial(sampled, draw=loss_draw)
    loss = lm_loss(model, batch, normalizer, head=head, cross_entropy=compute)
    return CausalLMOutputWithPast(loss=loss)


def _labelled(model: nn.Module, batch: Mapping[str, Tensor], head: LmHead) -> tuple[Tensor, Tensor]:
    """Return hidden states (M, hidden) or logits (M, V) of M labelled tokens, and the labels."""
    next_BL = torch.full_like(batch["labels"], UNLABELLED)
    next_BL[:, :-1] = batch["labels"][:, 1:]
    places_M = (next_BL.reshape(-1) != UNLABELLED).nonzero()[:, 0]
    if len(places_M) == 0:
        raise DataError(
            f"no token of this batch of {len(next_BL)} rows is labelled: there is nothing to learn",
            where="task",
            fix="leave out rows without labels",
        )
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    states_BLI = (states_of if head.reason is None else logits_of)(model, inputs)
    states_MI = states_BLI.reshape(-1, states_BLI.shape[-1]).index_select(0, places_M)
    return states_MI, next_BL.reshape(-1).index_select(0, places_M)


def _cross_entropy(
    model: nn.Module,
    states_MI: Tensor,
    target_M: Tensor,
    head: LmHead,
    compute: Callable[..., Tensor] = linear_cross_entropy,
) -> Tensor:
    """Return the summed cross-entropy of hidden states or logits, a scalar."""
    if head.reason is not None:
        wide = torch.promote_types(states_MI.dtype, torch.float32)
        return nn.functional.cross_entropy(states_MI.to(wide), target_M, reduction="sum")
    return _at_head(model, states_MI, compute, target_M, head)


def _at_head(
    model: nn.Module,
    states_MI: Tensor,
    compute: Callable[..., _Result],
    target_M: Tensor,
    head: LmHead,
) -> _Result:
    """Return ``compute`` of hidden states and head, in the dtype that nn.Linear would compute in.

    It runs as the head's own forward, because a sharded head is whole only there.
    """
    linear = model.get_output_embeddings()  # type: ignore[operator]

    def forward(states_MI: Tensor) -> _Result:
        dtype = product_dtype(states_MI, linear.weight.dtype)
        return compute(
            states_MI.to(dtype),
            linear.weight.to(dtype),
            target_M,
            bias_V=linear.bias,
            scale=head.scale,
            cap=head.cap,
        )

    return call_as_forward(linear, forward, states_MI)
