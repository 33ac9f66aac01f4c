"""Load the model and data of a recipe's task: of texts with labels, or of conversations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from sparsegrad_cli.data.batches import ChatCollator, TextCollator, packed_rows, plain_text_rows
from sparsegrad_cli.data.chat_template import LLAMA2
from sparsegrad_cli.data.chat_tokens import ChatEncoder, encode_conversations
from sparsegrad_cli.data.class_weights import class_weights
from sparsegrad_cli.data.conversation import Conversation
from sparsegrad_cli.data.examples import TextData
from sparsegrad_cli.data.load_task import load_chat, load_task
from sparsegrad_cli.data.text_tokens import ensure_pad_token, fitting_length, tokenize
from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.models.classification_head import HeadStart
from sparsegrad_cli.models.label_loss import LabelLoss, use_label_loss
from sparsegrad_cli.models.lm_head import check_packing
from sparsegrad_cli.models.lm_loss import use_lm_loss
from sparsegrad_cli.models.load_model import (
    check_vocabulary,
    device_of,
    load_causal_lm,
    load_classifier,
)
from sparsegrad_cli.models.pretrained import load_tokenizer
from sparsegrad_cli.models.sampled_loss import SampledLoss
from sparsegrad_cli.recipe.checks import SMOOTHED_SCORES
from sparsegrad_cli.recipe.load_recipe import LoadedRecipe
from sparsegrad_cli.recipe.task_section import ChatSection, TaskSection
from sparsegrad_cli.recipe.tasks import CHAT_METRICS
from sparsegrad_cli.records.run import LossName, MixedSource, TaskKind
from sparsegrad_cli.tasks.objective import Classification, LanguageModelling, Objective

_CONVERSATIONS_KEPT = 32  # Validation conversations that are kept as text.


@dataclass(frozen=True)
class TaskFacts:
    """Facts about a task for the record.

    Attributes:
        name: name in the recipe.
        kind: ``classification``, ``regression``, ``multilabel`` or ``chat``.
        data_hash: sha256 (hex) of all the data used, in order.
        text_columns: names of the columns with the texts, one or two.
        label_names: class names of a classification.
        positive_label: the class that f1, precision and recall refer to, if they are measured.
        class_weights: weight of each class in the loss; None without weights.
        training_loss: full, or how a training step samples the vocabulary.
        majority: metric -> its value if every prediction is the most frequent class.
        notes: notes on data that was left out, truncated or split off.
        counts: number of conversations read, kept and dropped; the dropped ones by reason.
        sources: the sources of a mixture, with the rows taken of each.
    """

    name: str
    kind: TaskKind
    data_hash: str
    text_columns: tuple[str, ...] = ()
    label_names: tuple[str, ...] | None = None
    positive_label: str | None = None
    class_weights: tuple[float, ...] | None = None
    training_loss: LossName = "full"
    majority: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    sources: tuple[MixedSource, ...] = ()


@dataclass
class LoadedTask:
    """The model and data of a recipe's task.

    Attributes:
        task: facts for the record.
        objective: the loss and metrics.
        train_data: training data set; its rows hold only the inputs of the collator.
        validation: split name -> validation data set with such rows.
        test: split name -> data set for the test after training; empty without ``task.holdout``.
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
    test: dict[str, Any] = field(default_factory=dict)


class RowLimits(NamedTuple):
    """The number of rows to load when a model is inspected, not trained: the first ones."""

    train: int
    validation: int

    def apply(self, section: TaskSection) -> TaskSection:
        """Return the task with its row limits lowered to these."""
        limits = {
            "train_limit": min(self.train, section.train_limit or self.train),
            "eval_limit": min(self.validation, section.eval_limit or self.validation),
            "test_unused": None,
        }
        return section.model_copy(update=limits)


def load_classification(loaded: LoadedRecipe, limits: RowLimits | None = None) -> LoadedTask:
    """Load texts, tokenizer and classifier. The recipe's seed initializes a new head.

    Args:
        loaded: the recipe.
        limits: number of rows to load; all by default.

    Raises:
        UsageError: the recipe smooths or weights labels, but the data holds scores; or its class
            weights do not fit the classes.
        SparsegradError: the data, tokenizer or model cannot be used; see their loaders.
    """
    recipe = loaded.recipe
    section = limits.apply(recipe.task) if limits else recipe.task
    task = load_task(section)
    spec = task.spec
    loss = _label_loss(loaded, task)
    tokenizer = load_tokenizer(recipe.model)
    model, head = load_classifier(recipe.model, spec, recipe.seed, device_of(recipe))
    use_label_loss(model, loss)
    check_vocabulary(tokenizer, model, loaded.where("model.name"))
    max_length, cut_note = fitting_length(section.max_length, model.config)
    pad_note = ensure_pad_token(tokenizer, model.config)
    train_data, sets, length_note = tokenize(
        task, tokenizer, max_length=max_length, padding=section.padding
    )
    notes = (*task.notes, head.note, pad_note, cut_note, length_note)
    return LoadedTask(
        TaskFacts(
            spec.name,
            spec.kind,
            task.data_hash,
            text_columns=spec.text_columns,
            label_names=spec.label_names,
            positive_label=spec.positive_label,
            class_weights=loss.weights,
            majority=task.majority,
            notes=tuple(note for note in notes if note),
            sources=task.sources,
        ),
        Classification(spec, loss),
        train_data,
        {split: sets[split] for split in task.validation},
        tokenizer,
        TextCollator(tokenizer, max_length=max_length, padding=section.padding),
        model,
        head,
        test={split: sets[split] for split in task.test},
    )


def _label_loss(loaded: LoadedRecipe, task: TextData) -> LabelLoss:
    """Return the loss of a recipe; see :func:`load_classification` for its errors."""
    spec, train = task.spec, loaded.recipe.train
    if spec.regression and train.label_smoothing_factor:
        where = loaded.where("train.label_smoothing_factor")
        raise UsageError(SMOOTHED_SCORES, where=where, fix="leave it out")
    where = loaded.where("train.class_weights")
    weights = class_weights(train.class_weights, spec, task.train["label"], where)
    return LabelLoss(spec.multilabel, train.label_smoothing_factor, weights)


def load_chat_task(loaded: LoadedRecipe, limits: RowLimits | None = None) -> LoadedTask:
    """Load conversations as rows of token ids, the tokenizer, and the model.

    The model computes logits only where the loss needs them, if its architecture allows that.

    Args:
        loaded: the recipe.
        limits: number of conversations to load, counted after the ones that are too long are
            dropped; all by default.

    Raises:
        SparsegradError: the data, tokenizer or model cannot be used; see their loaders.
    """
    recipe, section = loaded.recipe, loaded.recipe.task
    chat = section.chat or ChatSection()
    data = load_chat(section)
    tokenizer = load_tokenizer(recipe.model)
    model = load_causal_lm(recipe.model, device_of(recipe))
    check_vocabulary(tokenizer, model, loaded.where("model.name"))
    max_length, cut_note = fitting_length(section.max_length, model.config)
    encoder = ChatEncoder(tokenizer)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = LLAMA2  # The template is then saved with the model.
    # Validation rows are single conversations, so that metrics do not depend on packing.
    enough = limits and limits.validation
    train, *sets = (
        encode_conversations(encoder, part, max_length=max_length, split=split, enough=count)
        for split, part, count in (
            ("training", data.train, limits and limits.train),
            ("validation", data.validation, enough),
            *((name, part, enough) for name, part in data.evaluation.items()),
        )
    )
    if chat.packing == "pack":
        check_packing(model)
    sampled = SampledLoss.of(recipe)
    head = use_lm_loss(model, sampled)
    head_note = f"all logits are made, because {head.reason}" if head.reason else None
    names = ("validation", *data.evaluation)
    validation = {name: found.data for name, found in zip(names, sets, strict=True)}
    if chat.forgetting is not None:
        limit = (limits.apply(section) if limits else section).eval_limit
        validation["plain text"] = plain_text_rows(
            tokenizer, chat.forgetting, max_length=max_length, limit=limit
        )
    too_long = (train.too_long, *(found.too_long for found in sets))
    notes = (*data.notes, *encoder.notes, *too_long, cut_note, head_note)
    fixed_length = max_length if section.padding == "fixed" else None
    return LoadedTask(
        TaskFacts(
            section.name,
            "chat",
            data.data_hash,
            notes=tuple(note for note in notes if note),
            training_loss=sampled.name if sampled else "full",
            counts={
                **data.counts,
                **{k: n for found in (train, *sets) for k, n in found.counts.items()},
            },
            sources=tuple(data.mixture.sources(train.kept)) if data.mixture else (),
        ),
        LanguageModelling(section.metric or CHAT_METRICS[0], head, sampled),
        packed_rows(train.data, chat.packing, max_length, tokenizer.eos_token_id),
        validation,
        tokenizer,
        ChatCollator(_pad_id(tokenizer), fixed_length),
        model,
        conversations=data.validation[:_CONVERSATIONS_KEPT],
    )


def _pad_id(tokenizer: Any) -> int:
    """Return a token id for padding. Any id works, because the lengths mark the padding."""
    found = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(number for number in found if number is not None)
