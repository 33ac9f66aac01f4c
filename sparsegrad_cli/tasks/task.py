"""The return types of all task loaders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from sparsegrad_cli.data.conversation import Conversation
from sparsegrad_cli.models.classification_head import HeadStart
from sparsegrad_cli.recipe.task_section import TaskSection
from sparsegrad_cli.records.run import TaskKind
from sparsegrad_cli.tasks.objective import Objective


@dataclass(frozen=True)
class TaskFacts:
    """Facts about a task for the record.

    Attributes:
        name: name in the recipe.
        kind: ``classification``, ``regression`` or ``chat``.
        data_hash: sha256 (hex) of all the data used, in order.
        label_names: class names of a classification.
        positive_label: the class that f1, precision and recall refer to, if they are measured.
        majority: metric -> its value if every prediction is the most frequent class.
        notes: notes on data that was left out, truncated or split off.
        counts: number of conversations read, kept and dropped; the dropped ones by reason.
    """

    name: str
    kind: TaskKind
    data_hash: str
    label_names: tuple[str, ...] | None = None
    positive_label: str | None = None
    majority: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)


@dataclass
class LoadedTask:
    """The model and data of a recipe's task.

    Attributes:
        task: facts for the record.
        objective: the loss and metrics.
        train_data: training data set; its rows hold only the inputs of the collator.
        validation: split name -> validation data set with such rows.
        tokenizer: the model's tokenizer.
        collator: makes a batch from rows.
        model: the model as loaded from its files.
        head: origin of a classifier's head; None for a language model.
        conversations: the first validation conversations, as they were read.
    """

    task: TaskFacts
    objective: Objective
    train_data: Any
    validation: dict[str, Any]
    tokenizer: Any
    collator: Any
    model: nn.Module
    head: HeadStart | None = None
    conversations: list[Conversation] = field(default_factory=list)


class RowLimits(NamedTuple):
    """The number of rows to load when a model is inspected, not trained: the first ones."""

    train: int
    validation: int

    def apply(self, section: TaskSection) -> TaskSection:
        """Return the task with its row limits lowered to these."""
        limits = {
            "train_limit": min(self.train, section.train_limit or self.train),
            "eval_limit": min(self.validation, section.eval_limit or self.validation),
        }
        return section.model_copy(update=limits)
