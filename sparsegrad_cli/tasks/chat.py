"""Load the model and data of a chat task: a language model and conversations."""

from __future__ import annotations

from typing import Any

from sparsegrad_cli.data.batches import ChatCollator, concatenate, pack, plain_text_rows
from sparsegrad_cli.data.chat_template import LLAMA2
from sparsegrad_cli.data.chat_tokens import ChatEncoder, encode_conversations
from sparsegrad_cli.data.load_task import load_chat
from sparsegrad_cli.data.text_tokens import fitting_length
from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.io.suggest import suggest
from sparsegrad_cli.models.lm_head import check_packing
from sparsegrad_cli.models.lm_loss import use_lm_loss
from sparsegrad_cli.models.load_model import check_vocabulary, device_of, load_causal_lm
from sparsegrad_cli.models.pretrained import load_tokenizer
from sparsegrad_cli.recipe.load_recipe import LoadedRecipe
from sparsegrad_cli.recipe.task_section import ChatSection
from sparsegrad_cli.recipe.tasks import CHAT_METRICS
from sparsegrad_cli.tasks.objective import LanguageModelling
from sparsegrad_cli.tasks.task import LoadedTask, RowLimits, TaskFacts

_CONVERSATIONS_KEPT = 32  # Validation conversations that are kept as text.


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
    metric = section.metric or "loss"
    if metric not in CHAT_METRICS:
        raise UsageError(
            f"{metric!r} is not a metric of conversations",
            where=loaded.where("task.metric"),
            fix=suggest(metric, CHAT_METRICS),
        )
    data = load_chat(section)
    tokenizer = load_tokenizer(recipe.model)
    model = load_causal_lm(recipe.model, device_of(recipe))
    check_vocabulary(tokenizer, model, loaded.where("model.name"))
    max_length, cut_note = fitting_length(section.max_length, model.config)
    encoder = ChatEncoder(tokenizer)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = LLAMA2  # The template is then saved with the model.
    train = encode_conversations(
        encoder, data.train, max_length=max_length, enough=limits and limits.train
    )
    # Validation rows are single conversations, so that metrics do not depend on packing.
    held_out = encode_conversations(
        encoder,
        data.validation,
        max_length=max_length,
        split="validation",
        enough=limits and limits.validation,
    )
    counts = dict(data.counts)
    for name, split in (("training", train), ("validation", held_out)):
        counts |= {f"{name}: {what}": count for what, count in split.counts.items()}
        counts[f"{name}: labelled tokens"] = split.labelled
    if chat.packing == "pack":
        check_packing(model)
    head = use_lm_loss(model)
    head_note = f"all logits are made, because {head.reason}" if head.reason else None
    validation = {"validation": held_out.data}
    if chat.forgetting is not None:
        validation["plain text"] = plain_text_rows(
            tokenizer,
            chat.forgetting,
            max_length=max_length,
            limit=(limits.apply(section) if limits else section).eval_limit,
        )
    notes = (*data.notes, *encoder.notes, train.too_long, held_out.too_long, cut_note, head_note)
    return LoadedTask(
        TaskFacts(
            section.name,
            "chat",
            data.data_hash,
            notes=tuple(note for note in notes if note),
            counts=counts,
        ),
        LanguageModelling(metric, head),
        packed_rows(train.data, chat.packing, max_length, tokenizer),
        validation,
        tokenizer,
        ChatCollator(
            _pad_id(tokenizer), fixed_length=max_length if section.padding == "fixed" else None
        ),
        model,
        conversations=data.validation[:_CONVERSATIONS_KEPT],
    )


def packed_rows(data: Any, packing: str, length: int, tokenizer: Any) -> Any:
    """Pack rows of token ids as the recipe says."""
    if packing == "pack":
        return pack(data, length)
    if packing == "concatenate":
        return concatenate(data, length, tokenizer.eos_token_id)
    return data


def _pad_id(tokenizer: Any) -> int:
    """Return a token id for padding. Any id works, because the lengths mark the padding."""
    found = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(number for number in found if number is not None)
