"""Model and data of a chat task: conversations, and a language model that learns to answer."""

from __future__ import annotations

from typing import Any

from sparsegrad_cli.data.batches import ChatCollator
from sparsegrad_cli.data.chat_template import LLAMA2
from sparsegrad_cli.data.chat_tokens import ChatEncoder, encode_conversations
from sparsegrad_cli.data.load_task import load_chat
from sparsegrad_cli.data.packing import concatenate, pack, plain_text_rows
from sparsegrad_cli.data.text_tokens import fitting_length
from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.io.suggest import suggest
from sparsegrad_cli.models.device import device_of
from sparsegrad_cli.models.lm_head import check_packing
from sparsegrad_cli.models.lm_loss import use_lm_loss
from sparsegrad_cli.models.load_model import check_vocabulary, load_causal_lm
from sparsegrad_cli.models.pretrained import load_tokenizer
from sparsegrad_cli.recipe.load_recipe import LoadedRecipe
from sparsegrad_cli.recipe.task_section import ChatSection
from sparsegrad_cli.recipe.tasks import CHAT_METRICS
from sparsegrad_cli.tasks.classification import Few, Parts
from sparsegrad_cli.tasks.objective import LanguageModelling, TaskFacts

_CONVERSATIONS = 32  # of validation that are kept as text


def load_chats(loaded: LoadedRecipe, few: Few | None = None) -> Parts:
    """Conversations as rows of token ids, tokenizer, and a model that makes few logits.

    Args:
        few: conversations that are enough: of those that have something to learn, as training
            counts them, for the first ones of a file may all be too long.

    Raises:
        SparsegradError: of the kind that fits; see the loaders.
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
    max_length, cut = fitting_length(section.max_length, model.config)
    encoder = ChatEncoder(tokenizer)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = LLAMA2  # what is saved with the model is what it was trained with
    train = encode_conversations(
        encoder, data.train, max_length=max_length, enough=few and few.train
    )
    # Packed or not, validation is by conversation: what it measures must not depend on packing.
    held_out = encode_conversations(
        encoder,
        data.validation,
        max_length=max_length,
        split="validation",
        enough=few and few.validation,
    )
    counts = dict(data.counts)
    for name, split in (("training", train), ("validation", held_out)):
        counts |= {f"{name}: {what}": count for what, count in split.counts.items()}
        counts[f"{name}: labelled tokens"] = split.labelled
    if chat.packing == "pack":
        check_packing(model)
    head = use_lm_loss(model)
    whole = f"all logits are made, because {head.reason}" if head.reason else None
    validation = {"validation": held_out.data}
    if chat.forgetting is not None:
        validation["plain text"] = plain_text_rows(
            tokenizer,
            chat.forgetting,
            max_length=max_length,
            limit=(few.of(section) if few else section).eval_limit,
        )
    more = (train.too_long, held_out.too_long, cut, whole)
    notes = [*data.notes, *encoder.notes, *(note for note in more if note)]
    task = TaskFacts(section.name, "chat", None, {}, tuple(notes), counts, data.data_hash)
    return Parts(
        task,
        LanguageModelling(metric, head),
        packed_rows(train.data, chat.packing, max_length, tokenizer),
        validation,
        tokenizer,
        ChatCollator(
            _pad_id(tokenizer), fixed_length=max_length if section.padding == "fixed" else None
        ),
        model,
        None,
        data.validation[:_CONVERSATIONS],
    )


def packed_rows(data: Any, packing: str, length: int, tokenizer: Any) -> Any:
    """Rows of token ids as the recipe packs them."""
    if packing == "pack":
        return pack(data, length)
    if packing == "concatenate":
        return concatenate(data, length, tokenizer.eos_token_id)
    return data


def _pad_id(tokenizer: Any) -> int:
    """Any token does: what is padding follows from lengths."""
    found = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(number for number in found if number is not None)
