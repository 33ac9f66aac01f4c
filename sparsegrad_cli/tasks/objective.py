"""How a model is judged on a task, and what the run's record says of the task."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from sparsegrad_cli.data.load_task import LoadedTask
from sparsegrad_cli.data.metrics import mean_loss, score
from sparsegrad_cli.interruption import raise_if_requested
from sparsegrad_cli.models.lm_head import LmHead
from sparsegrad_cli.models.lm_loss import LmSums, lm_sums
from sparsegrad_cli.models.sharded_tensors import within
from sparsegrad_cli.recipe.tasks import TaskSpec

_WORST = 1e9  # for what is not a number: JSON has none


@dataclass(frozen=True)
class Judgement:
    """One evaluation of one split: metric values, mean loss, and what holds by definition only."""

    values: dict[str, float]
    loss: float
    notes: tuple[str, ...] = ()


class Objective(Protocol):
    """What training is for."""

    metric: str
    """The metric that selects the best model; sparsegrad_cli/scales.py says which way is up."""

    by_token: bool
    """The loss of an optimizer step is a mean over its labelled tokens, not over micro-batches."""

    def judge(self, trainer: Any, name: str, data: Any) -> Judgement:
        """Evaluate the trainer's model on a split, over all processes."""
        ...


class Classification:
    """Classes or scores of whole texts, by the task's metrics."""

    by_token = False

    def __init__(self, spec: TaskSpec) -> None:
        self.spec, self.metric = spec, spec.metric

    def judge(self, trainer: Any, name: str, data: Any) -> Judgement:
        """All metrics of the task; see :class:`Objective`."""
        loader = trainer.get_eval_dataloader(data)
        output = trainer.evaluation_loop(loader, description=name)
        predictions = output.predictions
        if isinstance(predictions, tuple):
            predictions = predictions[0]
        predictions, labels = np.asarray(predictions), np.asarray(output.label_ids)
        found = score(self.spec, predictions, labels)
        # Not transformers' mean of batch means: where the last batch of several processes is filled
        # up with rows from the beginning, these would count twice.
        loss = mean_loss(
            self.spec, predictions, labels, smoothing=trainer.args.label_smoothing_factor
        )
        return Judgement(dict(found.values), loss, found.notes)


class LanguageModelling:
    """Answers token by token: loss, perplexity and next-token accuracy per labelled token.

    Sums are kept, not logits; every conversation counts once, over however many processes.
    """

    by_token = True

    def __init__(self, metric: str, head: LmHead) -> None:
        self.metric, self._head = metric, head

    def judge(self, trainer: Any, name: str, data: Any) -> Judgement:
        """Over the labelled tokens of a split; see :class:`Objective`."""
        model, args = trainer.accelerator.unwrap_model(trainer.model), trainer.args
        rows = range(args.process_index, len(data), args.world_size)
        size = args.eval_batch_size
        sums = LmSums()
        was_training = model.training
        model.eval()
        # Where weights are split, a forward pass is everybody's: who has no rows left, joins in.
        most = -(-len(data) // args.world_size)
        for start in range(0, most, size):
            raise_if_requested("a batch of an evaluation")
            own = rows[start : start + size]
            batch = trainer.data_collator([data[row] for row in own or [0]])
            batch = {key: value.to(args.device) for key, value in batch.items()}
            # What accelerate wraps in autocast is the model's forward, which is not called here.
            with torch.no_grad(), trainer.accelerator.autocast():
                found = within(model, functools.partial(lm_sums, model, batch, head=self._head))
            if own:
                sums += found
        model.train(was_training)
        here = torch.tensor([sums.loss, sums.tokens, sums.correct], dtype=torch.float64)
        nll, tokens, correct = trainer.accelerator.reduce(here.to(args.device), "sum").tolist()
        loss = nll / tokens
        if not math.isfinite(loss):
            note = "the validation loss is not a number: it is given its highest value"
            return Judgement(
                {"loss": _WORST, "perplexity": _WORST, "token_accuracy": 0.0}, _WORST, (note,)
            )
        values = {
            "loss": loss,
            "perplexity": math.exp(min(loss, math.log(_WORST))),
            "token_accuracy": correct / tokens,
        }
        return Judgement(values, loss)


@dataclass(frozen=True)
class TaskFacts:
    """What a record says of a task.

    Attributes:
        name: as in the recipe.
        kind: ``classification``, ``regression`` or ``chat``.
        label_names: of a classification.
        majority: metric -> its value for always giving the commonest answer; empty for chat.
        notes: what was left out or split off.
        counts: conversations read, kept and dropped, each with its reason; empty but for chat.
        data_hash: sha256 (hex) over everything used, in order.
        positive_label: the class of two that f1, precision and recall are of, where one of them is
            measured.
    """

    name: str
    kind: str
    label_names: tuple[str, ...] | None
    majority: Mapping[str, float]
    notes: tuple[str, ...]
    counts: Mapping[str, int]
    data_hash: str
    positive_label: str | None = None

    @classmethod
    def of(cls, task: LoadedTask) -> TaskFacts:
        """Facts of a task of whole texts."""
        spec = task.spec
        kind = "regression" if spec.regression else "classification"
        return cls(
            spec.name,
            kind,
            spec.label_names,
            task.majority,
            task.notes,
            {},
            task.data_hash,
            spec.positive_label,
        )
