"""Build a recipe's model and batches without weights and data."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.models.lm_loss import use_lm_loss
from sparsegrad_cli.models.load_model import name_labels
from sparsegrad_cli.models.pretrained import require_task
from sparsegrad_cli.models.sampled_loss import SampledLoss
from sparsegrad_cli.recipe.load_recipe import LoadedRecipe
from sparsegrad_cli.recipe.schema import Recipe
from sparsegrad_cli.recipe.tasks import (
    BUILTIN_TASKS,
    CHAT_TASKS,
    GLUE_TASKS,
    TaskSpec,
    type_by_settings,
)

Batch = dict[str, Tensor]
Mask = Literal["none", "padding", "packing"]


def name_task(recipe: Recipe, config: Any, known: TaskSpec | None = None) -> list[str]:
    """Set the task's classes in a model's configuration; return notes on what was assumed.

    A language model has no classes, so its configuration stays unchanged.

    Args:
        known: the task's specification, if its files were read.
    """
    name = recipe.task.name
    if name in CHAT_TASKS:
        return ["every token is labelled, which no conversation does: the upper limit"]
    spec = known or BUILTIN_TASKS.get(name) or GLUE_TASKS.get(name.removeprefix("glue/"))
    notes = []
    kind = type_by_settings(recipe.task.type, recipe.task.metric)
    columns = recipe.task.columns
    if spec is None and kind == "regression":
        spec = TaskSpec(name, ("text",), "label", None, True, "pearson", ("pearson",))
    elif spec is None:
        known_names = columns.labels if columns is not None else None
        if known_names is None:
            notes = ["two classes assumed: the task's files are not read"]
        spec = TaskSpec(
            name,
            ("text",),
            "label",
            known_names or ("0", "1"),
            False,
            "accuracy",
            ("accuracy",),
            multilabel=kind == "multilabel",
        )
    name_labels(config, spec)
    if getattr(config, "pad_token_id", None) is None:
        # Classifiers on decoders need one; training would use the tokenizer's end token.
        end = getattr(config, "eos_token_id", None)
        config.pad_token_id = end if isinstance(end, int) else 0
    return notes


def bare_model(loaded: LoadedRecipe, config: Any) -> nn.Module:
    """Build the model that training would load, with training's loss for a chat task.

    Raises:
        UsageError: a model of this kind cannot do the task.
    """
    import transformers

    section, chat = loaded.recipe.model, loaded.recipe.task.name in CHAT_TASKS
    loader = (
        transformers.AutoModelForCausalLM
        if chat
        else transformers.AutoModelForSequenceClassification
    )
    require_task(config, section.name, chat=chat, where=loaded.where("model.name"))
    try:
        model: nn.Module = loader.from_config(
            copy.deepcopy(config),
            dtype=getattr(torch, section.dtype),
            trust_remote_code=section.trust_remote_code,
        )
    except ValueError as error:
        raise UsageError(
            f"transformers cannot build {section.name} from its configuration: "
            f"{str(error).partition(chr(10))[0]}",
            where=loaded.where("model.name"),
        ) from error
    if chat:
        use_lm_loss(model, SampledLoss.of(loaded.recipe))
    return model


def mask_of(recipe: Recipe, *, padded: bool, evaluating: bool = False) -> Mask:
    """Return why attention has a mask: some row is padded, or rows hold several conversations.

    Args:
        padded: whether the rows of a batch may have different lengths.
        evaluating: whether the batch is for validation, which never packs conversations.
    """
    if recipe.task.name in CHAT_TASKS and not evaluating:
        packing = recipe.task.chat.packing if recipe.task.chat else "none"
        if packing != "none":
            return "packing" if packing == "pack" else "none"
    return "padding" if padded else "none"


def bare_batch(recipe: Recipe, config: Any, size: int, length: int, mask: Mask) -> Batch:
    """Return (size, length) token ids and the tensors that the task's collator adds."""
    ids = torch.zeros(size, length, dtype=torch.int64)
    batch = {"input_ids": ids}
    if mask != "packing":
        batch["attention_mask"] = torch.ones_like(ids)
    if recipe.task.name in CHAT_TASKS:
        return {**batch, "position_ids": torch.zeros_like(ids), "labels": torch.zeros_like(ids)}
    if getattr(config, "type_vocab_size", 0) > 1:
        batch["token_type_ids"] = torch.zeros_like(ids)
    problem = getattr(config, "problem_type", None)
    if problem == "multi_label_classification":
        return {**batch, "labels": torch.zeros(size, config.num_labels)}
    kind = torch.float32 if problem == "regression" else torch.int64
    return {**batch, "labels": torch.zeros(size, dtype=kind)}


@contextmanager
def transformers_sees(mask: Mask) -> Iterator[None]:
    """Make transformers build a mask for attention, or no mask.

    transformers checks a batch to see whether it needs a mask. While it is traced, it assumes that
    it does. If tracing is reported as off, it reads from the fake tensors that every position
    counts and that position ids never restart (:class:`ShapesOnly`), and builds no mask.
    """
    from transformers import masking_utils

    theirs = masking_utils.is_tracing
    try:
        if mask == "none":
            masking_utils.is_tracing = lambda tensor=None: False
        yield
    finally:
        masking_utils.is_tracing = theirs
