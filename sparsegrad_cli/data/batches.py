"""Make padded batches of token ids: of texts with labels, and of conversations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

UNLABELLED = -100  # label of a token without a loss, as in torch and transformers


def token_rows(ids: list[list[int]], labels: list[list[int]], **more: list[list[int]]) -> Dataset:
    """Make a data set with columns ``input_ids``, ``labels`` and more, all lists of int32."""
    from datasets import Dataset, Features, List, Value

    columns = {"input_ids": ids, "labels": labels, **more}
    return Dataset.from_dict(
        columns, features=Features({name: List(Value("int32")) for name in columns})
    )


def longest_batch(dataset: Dataset, size: int) -> list[dict[str, Any]]:
    """Return the ``size`` rows with the most tokens, longest first: the worst case for memory.

    The result is shorter if the data set is smaller. Rows of equal length keep their order.
    """
    import pyarrow.compute as pc

    if size < 1:
        raise ValueError(f"Expected a size of at least 1, got {size}")
    table = dataset.select_columns(["input_ids"]).with_format("arrow")[:]
    lengths = pc.list_value_length(table["input_ids"]).to_pylist()
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    return [dataset[row] for row in order[:size]]


class TextCollator:
    """Pad rows of :func:`~.text_tokens.tokenize` to one batch of tensors.

    Every tensor is (batch, length), and ``labels`` is (batch,). The padding side is the
    tokenizer's. It is a class because worker processes cannot be sent a closure.

    Args:
        tokenizer: with a pad token.
        max_length: length of every batch with fixed padding.
        padding: ``dynamic`` pads to the longest row of the batch, ``fixed`` to ``max_length``.
    """

    def __init__(
        self, tokenizer: Any, *, max_length: int, padding: Literal["dynamic", "fixed"]
    ) -> None:
        from transformers import DataCollatorWithPadding

        fixed = padding == "fixed"
        self._pad: Callable[[list[dict[str, Any]]], Mapping[str, Tensor]] = DataCollatorWithPadding(
            tokenizer,
            padding="max_length" if fixed else "longest",
            max_length=max_length if fixed else None,
        )

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return dict(self._pad(rows))


@dataclass(frozen=True)
class ChatCollator:
    """Pad rows of conversations to one batch of int64 tensors, each (batch, length).

    A row has ``input_ids`` and ``labels``; a packed row also has ``lengths``, the lengths of its
    conversations. A batch has ``input_ids``, ``labels`` (-100 without a loss), ``position_ids``
    (from 0 in every conversation) and, unless rows are packed, ``attention_mask``. Without a mask
    and without a cache, transformers keeps conversations apart where position ids start again, so
    a packed batch needs ``use_cache=False``. Padding follows from the lengths of rows, never from
    a token's id, because a model may pad with its end token.

    Args:
        pad_id: any token id.
        fixed_length: length of every batch; None takes that of the longest row.
    """

    pad_id: int
    fixed_length: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        import torch

        length = self.fixed_length or max(len(row["input_ids"]) for row in rows)
        shape = (len(rows), length)
        packed = any("lengths" in row for row in rows)
        ids = torch.full(shape, self.pad_id)
        labels = torch.full(shape, UNLABELLED)
        positions = torch.zeros(shape, dtype=torch.int64)
        mask = torch.zeros(shape, dtype=torch.int64)
        for number, row in enumerate(rows):
            size = len(row["input_ids"])
            ids[number, :size] = torch.as_tensor(row["input_ids"])
            labels[number, :size] = torch.as_tensor(row["labels"])
            mask[number, :size] = 1
            lengths = list(row["lengths"]) if packed else [size]
            for end, part in zip(accumulate(lengths), lengths, strict=True):
                positions[number, end - part : end] = torch.arange(part)
                labels[number, end - part] = UNLABELLED
            # Positions of padding start again too: it is one more conversation, which nobody sees.
            positions[number, size:] = torch.arange(length - size)
        batch = {"input_ids": ids, "position_ids": positions, "labels": labels}
        return batch if packed else {**batch, "attention_mask": mask}
