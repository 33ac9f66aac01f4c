"""What the loaders of all tasks return."""

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
    """What the record says about a task.

    Attributes:
        name: as in the recipe.
        kind: ``classification``, ``regression`` or ``chat``.
        data_hash: sha256 (hex) of all the data used, in order.
        label_names: of a classification.
        positive_label: the class that f1, precision and recall refer to, where they are measured.
        majority: metric -> its value for always answering the most frequent class.
        notes: what was left out, cut or split off.
        counts: conversations that were read, kept and dropped, each with the reason.
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
        objective: how the model is judged.
        train_data, validation: data sets whose rows hold what the collator takes, nothing else.
        tokenizer: of the model.
        collator: makes a batch of rows.
        model: as its files have it.
        head: where a classifier's head comes from; None for a language model.
        conversations: the first ones of validation, as they were read.
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
    """The number of first rows that suffice where a model is not trained but inspected."""

    train: int
    validation: int

    def apply(self, section: TaskSection) -> TaskSection:
        """Return the task with no more rows than these."""
        limits = {
            "train_limit": min(self.train, section.train_limit or self.train),
            "eval_limit": min(self.validation, section.eval_limit or self.validation),
        }
        return section.model_copy(update=limits)
