"""Model and data of a task of whole texts: classes or scores."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import nn

from sparsegrad_cli.data.batches import TextCollator
from sparsegrad_cli.data.conversation import Conversation
from sparsegrad_cli.data.load_task import load_task
from sparsegrad_cli.data.text_tokens import ensure_pad_token, fitting_length, tokenize
from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.models.classification_head import HeadStart
from sparsegrad_cli.models.device import device_of
from sparsegrad_cli.models.load_model import check_vocabulary, load_classifier
from sparsegrad_cli.models.pretrained import load_tokenizer
from sparsegrad_cli.recipe.load_recipe import LoadedRecipe
from sparsegrad_cli.recipe.task_section import TaskSection
from sparsegrad_cli.recipe.training import SMOOTHED_SCORES
from sparsegrad_cli.tasks.objective import Classification, Objective, TaskFacts


@dataclass
class Parts:
    """What a task gives to a run: the data sets hold what the collator takes, and nothing else.

    ``head`` says where a classifier's head comes from; a language model has none of its own.
    ``conversations`` are the first ones that it is validated on, as they were read.
    """

    task: TaskFacts
    objective: Objective
    train_data: Any
    validation: dict[str, Any]
    tokenizer: Any
    collator: Any
    model: nn.Module
    head: HeadStart | None
    conversations: list[Conversation]


class Few(NamedTuple):
    """Rows that are enough, the first ones, where a model is not trained but looked at."""

    train: int
    validation: int

    def of(self, section: TaskSection) -> TaskSection:
        """The task with no more than these."""
        limits = {
            "train_limit": min(self.train, section.train_limit or self.train),
            "eval_limit": min(self.validation, section.eval_limit or self.validation),
        }
        return section.model_copy(update=limits)


def load_texts(loaded: LoadedRecipe, few: Few | None = None) -> Parts:
    """Data, tokenizer and classifier; a new head is drawn from the recipe's seed.

    Raises:
        UsageError: labels are to be smoothed, and are scores: of a file that is known only now.
        SparsegradError: of the kind that fits; see the loaders.
    """
    recipe = loaded.recipe
    section = few.of(recipe.task) if few else recipe.task
    task = load_task(section)
    if task.spec.regression and recipe.train.label_smoothing_factor:
        where = loaded.where("train.label_smoothing_factor")
        raise UsageError(SMOOTHED_SCORES, where=where, fix="leave it out")
    tokenizer = load_tokenizer(recipe.model)
    model, head = load_classifier(recipe.model, task.spec, recipe.seed, device_of(recipe))
    check_vocabulary(tokenizer, model, loaded.where("model.name"))
    max_length, cut = fitting_length(section.max_length, model.config)
    notes = [*task.notes, head.note, ensure_pad_token(tokenizer, model.config), cut]
    of_lengths: list[str] = []
    train_data, validation = tokenize(
        task, tokenizer, max_length=max_length, padding=section.padding, notes=of_lengths
    )
    notes += of_lengths
    return Parts(
        replace(TaskFacts.of(task), notes=tuple(note for note in notes if note)),
        Classification(task.spec, recipe.train.label_smoothing_factor),
        train_data,
        validation,
        tokenizer,
        TextCollator(tokenizer, max_length=max_length, padding=section.padding),
        model,
        head,
        [],
    )
