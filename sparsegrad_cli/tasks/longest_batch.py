"""Find the longest training batch of a task without loading the model.

A run measures memory on the longest examples of its data (:func:`longest_batch`). This module finds
the same rows with the data and the tokenizer alone, if that takes seconds at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sparsegrad_cli.data.batches import longest_batch, packed_rows
from sparsegrad_cli.data.chat_tokens import ChatEncoder, encode_conversations
from sparsegrad_cli.data.load_task import load_chat, load_task
from sparsegrad_cli.data.text_tokens import ensure_pad_token, fitting_length, tokenize
from sparsegrad_cli.errors import DownloadError
from sparsegrad_cli.models.pretrained import load_tokenizer
from sparsegrad_cli.recipe.schema import Recipe
from sparsegrad_cli.recipe.task_section import ChatSection
from sparsegrad_cli.recipe.tasks import CHAT_TASKS, TaskSpec

_MOST_TEXTS = 20_000  # Of more rows, only the ones with the most characters are tokenized.
_MOST_CONVERSATIONS = 2_000


@dataclass(frozen=True)
class Longest:
    """The longest batch that can occur in training.

    Attributes:
        width: tokens per row, including padding.
        lengths: tokens of each row without padding, in the order in which a smaller batch would
            take the rows; empty if the data is unknown.
        rows: number of training rows; None if the data is unknown.
        source: how the batch was found, in words.
        spec: the task's classes; None if the data was not read.
    """

    width: int
    lengths: tuple[int, ...] = ()
    rows: int | None = None
    source: str = "max_length"
    spec: TaskSpec | None = None

    def size(self, batch: int) -> int:
        """Return the rows of a batch, which are fewer if the data has fewer."""
        return batch if self.rows is None else min(batch, self.rows)

    def padded(self, batch: int) -> bool:
        """Return whether such a batch has padding; True if the data is unknown."""
        rows = self.lengths[:batch]
        return not rows or min(rows) < self.width


def find_longest(recipe: Recipe, config: Any, size: int) -> Longest:
    """Find the longest batch of a recipe's data; assume ``max_length`` if that would take long.

    Args:
        recipe: the recipe.
        config: the model's configuration, which may have fewer positions.
        size: number of examples in the batch.

    Raises:
        SparsegradError: the data or the tokenizer cannot be used, not by a run either.
    """
    length, _ = fitting_length(recipe.task.max_length, config)
    try:
        if recipe.task.name in CHAT_TASKS:
            return _of_conversations(recipe, length, size)
        return _of_texts(recipe, length, size)
    except DownloadError:
        return Longest(length, source="max_length: data or tokenizer are out of reach")


def _of_texts(recipe: Recipe, length: int, size: int) -> Longest:
    section = recipe.task
    task = load_task(section)
    tokenizer = load_tokenizer(recipe.model)
    ensure_pad_token(tokenizer)
    source, train, count = "the longest examples of the data", task.train, len(task.train)
    if section.padding == "fixed":  # All rows have the same length.
        train = train.select(range(min(size, len(train))))
    elif len(train) > _MOST_TEXTS:
        train = train.select(_most_characters(train, _MOST_TEXTS))
        source = f"the longest of the {_MOST_TEXTS:,} examples with the most characters"
    rows, *_ = tokenize(
        replace(task, train=train, validation={}, test={}),
        tokenizer,
        max_length=length,
        padding=section.padding,
    )
    batch = longest_batch(rows, size)
    width = max(len(row["input_ids"]) for row in batch)
    lengths = tuple(sum(row["attention_mask"]) for row in batch)
    return Longest(width, lengths, count, source, task.spec)


def _most_characters(data: Any, count: int) -> Sequence[int]:
    """Return the indices of the rows with the most characters, in ascending order."""
    sizes = [len(text) for text in data["text"]]
    if "text_pair" in data.column_names:
        sizes = [size + len(pair) for size, pair in zip(sizes, data["text_pair"], strict=True)]
    return sorted(sorted(range(len(sizes)), key=lambda row: -sizes[row])[:count])


def _of_conversations(recipe: Recipe, length: int, size: int) -> Longest:
    section = recipe.task
    data = load_chat(section)
    if len(data.train) > _MOST_CONVERSATIONS:
        count = f"{len(data.train):,} conversations"
        return Longest(length, source=f"max_length: {count} are too many to encode beforehand")
    tokenizer = load_tokenizer(recipe.model)
    encoded = encode_conversations(ChatEncoder(tokenizer), data.train, max_length=length)
    packing = (section.chat or ChatSection()).packing
    rows = packed_rows(encoded.data, packing, length, tokenizer.eos_token_id)
    lengths = tuple(len(row["input_ids"]) for row in longest_batch(rows, size))
    width = length if section.padding == "fixed" else lengths[0]
    return Longest(width, lengths, len(rows), "the longest conversations of the data")
