"""The training loss and the evaluation metrics of a task."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from sparsegrad_cli import distributed
from sparsegrad_cli.data.batches import UNLABELLED
from sparsegrad_cli.data.metrics import mean_loss, score
from sparsegrad_cli.models.label_loss import LabelLoss
from sparsegrad_cli.models.lm_head import LmHead
from sparsegrad_cli.models.lm_loss import LmSums, lm_sums
from sparsegrad_cli.models.sampled_loss import Draw, SampledLoss
from sparsegrad_cli.models.sharded_tensors import call_as_forward
from sparsegrad_cli.recipe.tasks import TaskSpec

_WORST = 1e9  # Replaces NaN and infinities, which JSON cannot hold.


@dataclass(frozen=True)
class Judgement:
    """The evaluation of one split: metric values, mean loss, and notes.

    A note names a value that is set by definition, not measured. With several labels a row, the
    threshold is the best one for the rows of the split, or the one that was given.

    ``logits`` and ``labels`` are those of all rows in their order, (N, C) float32 and (N,) or
    (N, L); None for a language model.
    """

    values: dict[str, float]
    loss: float
    notes: tuple[str, ...] = ()
    threshold: float | None = None
    logits: npt.NDArray[np.float32] | None = None
    labels: npt.NDArray[Any] | None = None


@dataclass(frozen=True)
class ValidationBatch:
    """One batch of a split, as one process sees it.

    Attributes:
        inputs: Arguments of the model's forward, on the model's device.
        rows: Numbers of the batch's rows in the split. Empty if this process has no rows left and
            only takes part in the forward pass: with sharded weights, every process must.
    """

    inputs: dict[str, Tensor]
    rows: Sequence[int]


class Objective(Protocol):
    """The training loss and the evaluation metrics of a task."""

    metric: str
    """The metric that selects the best model; records/metric_direction.py knows its direction."""

    by_token: bool
    """Whether the loss of a step is a mean over its labelled tokens; otherwise over its rows."""

    def items(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Count the items that a step's loss averages over, tokens or rows, as a 0-d tensor."""
        ...

    def loss(
        self,
        model: nn.Module,
        batch: Mapping[str, Tensor],
        items: Tensor | None = None,
        draw: Draw | None = None,
    ) -> Tensor:
        """Return the loss of a batch, a 0-d tensor with a gradient.

        Args:
            model: As prepared for training; its forward is called.
            batch: Inputs and labels, on the model's device.
            items: With ``by_token``, the divisor of the sum over the tokens; by default the number
                of labelled tokens in the batch.
            draw: For the loss of a training step, its place in training, which a loss over a
                sample of the classes draws from; None for the full loss.
        """
        ...

    def judge(
        self,
        model: nn.Module,
        batches: Iterable[ValidationBatch],
        threshold: float | None = None,
    ) -> Judgement:
        """Evaluate a model on a split. Each process evaluates its own batches.

        Args:
            model: The model in evaluation mode, not wrapped for data parallelism.
            batches: The batches of this process.
            threshold: With several labels a row, the probability from which a label is given; by
                default it is chosen on the split.
        """
        ...


class Classification:
    """Classification or regression of whole texts, evaluated by the task's metrics.

    Args:
        spec: The task.
        loss: The loss that the model computes (:func:`~.label_loss.use_label_loss`).
    """

    by_token = False

    def __init__(self, spec: TaskSpec, loss: LabelLoss | None = None) -> None:
        self.spec, self.metric = spec, spec.metric
        self._loss = loss or LabelLoss()

    def items(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Count the rows."""
        return torch.tensor(len(batch["labels"]), device=batch["labels"].device)

    def loss(
        self,
        model: nn.Module,
        batch: Mapping[str, Tensor],
        items: Tensor | None = None,
        draw: Draw | None = None,
    ) -> Tensor:
        """Return the mean loss over the batch's rows; see :class:`Objective`."""
        loss: Tensor = model(**batch).loss
        return loss

    def judge(
        self,
        model: nn.Module,
        batches: Iterable[ValidationBatch],
        threshold: float | None = None,
    ) -> Judgement:
        """Return all metrics of the task; see :class:`Objective`."""
        rows: list[int] = []
        predictions: list[Tensor] = []
        labels: list[Tensor] = []
        for batch in batches:
            inputs = {key: value for key, value in batch.inputs.items() if key != "labels"}
            logits = model(**inputs).logits.float().cpu()
            if batch.rows:
                rows += batch.rows
                predictions.append(logits)
                labels.append(batch.inputs["labels"].cpu())
        own = (rows, torch.cat(predictions), torch.cat(labels)) if rows else None
        parts = [part for part in distributed.all_gather(own) if part is not None]
        order = np.argsort(np.concatenate([part[0] for part in parts]))
        predictions_NC = torch.cat([part[1] for part in parts]).numpy()[order]
        labels_N = torch.cat([part[2] for part in parts]).numpy()[order]
        found = score(self.spec, predictions_NC, labels_N, threshold)
        # Computed from the logits of all rows, because a mean of batch means would weight rows
        # unequally.
        loss = mean_loss(
            self.spec,
            predictions_NC,
            labels_N,
            smoothing=self._loss.smoothing,
            weights=self._loss.weights,
        )
        return Judgement(
            dict(found.values), loss, found.notes, found.threshold, predictions_NC, labels_N
        )


class LanguageModelling:
    """Language modelling: loss, perplexity and next-token accuracy over labelled tokens.

    Sums are kept instead of logits. Every conversation counts once for any number of processes.
    Evaluations use the full loss, whatever training steps use.

    Args:
        metric: The metric that selects the best model.
        head: How the model computes logits (:func:`~.lm_loss.use_lm_loss`).
        sampled: The loss of training steps; None for the full loss.
    """

    by_token = True

    def __init__(self, metric: str, head: LmHead, sampled: SampledLoss | None = None) -> None:
        self.metric, self._head, self._sampled = metric, head, sampled

    def items(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Count the labelled tokens. The label at position 0 has no token that predicts it."""
        return (batch["labels"][..., 1:] != UNLABELLED).sum()

    def loss(
        self,
        model: nn.Module,
        batch: Mapping[str, Tensor],
        items: Tensor | None = None,
        draw: Draw | None = None,
    ) -> Tensor:
        """Return the summed loss over labelled tokens divided by ``items``; see `Objective`."""
        place = {} if self._sampled is None else {"loss_draw": draw}
        loss: Tensor = model(**batch, num_items_in_batch=items, **place).loss
        return loss

    def judge(
        self,
        model: nn.Module,
        batches: Iterable[ValidationBatch],
        threshold: float | None = None,
    ) -> Judgement:
        """Return all metrics, averaged over the split's labelled tokens; see `Objective`."""
        sums, device = LmSums(), torch.device("cpu")
        for batch in batches:
            device = batch.inputs["labels"].device
            found = call_as_forward(
                model, functools.partial(lm_sums, model, batch.inputs, head=self._head)
            )
            if batch.rows:
                sums += found
        totals = torch.tensor(
            [sums.loss, sums.tokens, sums.correct], dtype=torch.float64, device=device
        )
        distributed.all_reduce([totals])
        nll, tokens, correct = totals.tolist()
        loss = nll / tokens
        if not math.isfinite(loss):
            note = "the validation loss is NaN or infinite: it is recorded as the highest value"
            return Judgement(
                {"loss": _WORST, "perplexity": _WORST, "token_accuracy": 0.0}, _WORST, (note,)
            )
        values = {
            "loss": loss,
            "perplexity": math.exp(min(loss, math.log(_WORST))),
            "token_accuracy": correct / tokens,
        }
        return Judgement(values, loss)
