"""The training loss of a classifier where it is not the plain one of transformers.

Class weights w and label smoothing e change the loss of a row with class y and log-probabilities
log p to

    (1 - e) w_y (-log p_y)  +  e / C  sum_c w_c (-log p_c),

and that of a row with several labels to the mean over labels l of

    w_l y_l (-log s_l)  +  (1 - y_l) (-log(1 - s_l)),    s = sigmoid(logits).

The loss of a batch is the mean over its rows: the sum divided by the number of rows. (The ``mean``
of torch's cross_entropy divides by the sum of the rows' weights. Then a weight depends on which
other rows are in the batch, in a batch of one row it has no effect at all, and micro-batches do
not add up to the batch.) With the weights ``balanced`` gives, the mean weight of the training rows
is 1, so the size of the loss is kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LabelLoss:
    """A loss of logits and labels.

    Attributes:
        multilabel: whether a row may have several labels.
        smoothing: share of a class that is spread evenly over all classes.
        weights: weight of each class; None for 1 each.
    """

    multilabel: bool = False
    smoothing: float = 0.0
    weights: tuple[float, ...] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether transformers computes the same loss."""
        return not self.smoothing and self.weights is None

    def __call__(self, logits_NC: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss over rows, a 0-d tensor in float32 or wider.

        Args:
            logits_NC: (rows, classes).
            labels: (rows,) class ids; (rows, classes) of 1 and 0 for several labels a row.
        """
        logits_NC = logits_NC.to(torch.promote_types(logits_NC.dtype, torch.float32))
        weights_C = None if self.weights is None else logits_NC.new_tensor(self.weights)
        if self.multilabel:
            return nn.functional.binary_cross_entropy_with_logits(
                logits_NC, labels.to(logits_NC.dtype), pos_weight=weights_C
            )
        total = nn.functional.cross_entropy(
            logits_NC, labels, weight=weights_C, label_smoothing=self.smoothing, reduction="sum"
        )
        return total / len(labels)


def use_label_loss(model: nn.Module, loss: LabelLoss) -> None:
    """Let the model's own forward compute this loss if it is given labels.

    Thus calibration, warm-up and training use the same loss, and DistributedDataParallel, which
    synchronizes gradients only for what its forward computes, sees it.
    """
    if not loss.is_plain:
        # Set on the instance: a change on the class would reach other models.
        model.forward = functools.partial(_forward, model.forward, loss)


def _forward(
    plain: Callable[..., Any],
    loss: LabelLoss,
    *positional: Any,
    labels: Tensor | None = None,
    **inputs: Any,
) -> Any:
    """Run the forward of a classifier after :func:`use_label_loss`."""
    output = plain(*positional, **inputs)
    if labels is not None:
        output.loss = loss(output.logits, labels)
    return output
