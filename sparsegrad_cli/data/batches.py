"""Arrange token ids in rows and padded batches; pack or concatenate conversations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sparsegrad_cli.data.text_files import read_text
from sparsegrad_cli.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

UNLABELLED = -100  # label of a token without a loss, as in torch and transformers
_CHUNK = 1000  # rows made a table at a time
_Row = tuple[list[int], list[int], list[int]]  # ids, labels, lengths of the conversations in it


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
    if size < 1:
        raise ValueError(f"Expected a size of at least 1, got {size}")
    return [dataset[row] for row in longest_first(dataset)[:size]]


def longest_first(dataset: Dataset) -> list[int]:
    """Return the numbers of all rows, by their tokens; rows of equal length keep their order.

    Padding in a row, of ``task.padding: fixed``, counts as tokens.
    """
    import pyarrow.compute as pc

    table = dataset.select_columns(["input_ids"]).with_format("arrow")[:]
    lengths = pc.list_value_length(table["input_ids"]).to_pylist()
    return sorted(range(len(lengths)), key=lambda row: -lengths[row])


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


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put each item, longest first, into the first bin with enough room (first-fit decreasing).

    It needs at most 11/9 of the smallest number of bins plus 6/9 of a bin (Dosa 2007), in
    O(n log n) time: a tree over the bins holds the most room in each subtree. Equal lengths give
    equal bins.

    Args:
        lengths: lengths of the items.
        capacity: capacity of a bin.

    Returns:
        Bins of item numbers. Numbers ascend within a bin, and bins are sorted by their first
        number, so that packing does not sort a data set by length.

    Raises:
        ValueError: an item does not fit a bin.
    """
    if not lengths:
        return []
    if max(lengths) > capacity:
        raise ValueError(f"an item of {max(lengths)} does not fit a bin of {capacity}")
    leaves = 1 << (len(lengths) - 1).bit_length()
    room = [capacity] * (2 * leaves)  # node k has children 2k and 2k + 1
    bins: list[list[int]] = [[] for _ in lengths]
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        node = 1
        while node < leaves:
            node = 2 * node if room[2 * node] >= lengths[item] else 2 * node + 1
        bins[node - leaves].append(item)
        room[node] -= lengths[item]
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return sorted(sorted(items) for items in bins if items)


def pack(data: Dataset, length: int) -> Dataset:
    """Put several conversations into each row of at most ``length`` tokens.

    No conversation sees another: the collator restarts position ids at each. A conversation that is
    longer than ``length`` is cut; one without a labelled token left is dropped.

    Returns:
        Columns ``input_ids``, ``labels`` and ``lengths`` (int32).

    Raises:
        DataError: no row is left.
    """
    # Only lengths are kept here: token ids are fetched bin by bin.
    lengths = [
        (number, len(ids)) for number, row in enumerate(data) if (ids := _cut(row, length)[0])
    ]
    bins = first_fit([size for _, size in lengths], length)

    def rows() -> Iterator[_Row]:
        for items in bins:
            parts = [_cut(data[lengths[item][0]], length) for item in items]
            ids = [token for part, _ in parts for token in part]
            labels = [label for _, part in parts for label in part]
            yield ids, labels, [len(part) for part, _ in parts]

    return _table(rows(), length)


def concatenate(data: Dataset, length: int, end_id: int) -> Dataset:
    """Join all conversations and cut the result every ``length`` tokens, as the paper does.

    Attention crosses conversations, and a conversation may continue in the next block. One end
    token stands between two conversations: that of the assistant's last turn, or an unlabelled one
    if a conversation does not end with it. The last block is shorter. Blocks without a labelled
    token are left out.

    Raises:
        DataError: no row is left.
    """

    def blocks() -> Iterator[_Row]:
        ids: list[int] = []
        labels: list[int] = []
        for row in data:
            ended = row["input_ids"][-1] == end_id
            ids += row["input_ids"] if ended else [*row["input_ids"], end_id]
            labels += row["labels"] if ended else [*row["labels"], UNLABELLED]
            while len(ids) >= length:
                yield ids[:length], labels[:length], [length]
                ids, labels = ids[length:], labels[length:]
        yield ids, labels, [len(ids)]

    found = (block for block in blocks() if any(label != UNLABELLED for label in block[1][1:]))
    return _table(found, length).remove_columns("lengths")


def packed_rows(data: Dataset, packing: str, length: int, end_id: int) -> Dataset:
    """Return the rows of conversations as ``task.chat.packing`` says."""
    if packing == "pack":
        return pack(data, length)
    return concatenate(data, length, end_id) if packing == "concatenate" else data


def plain_text_rows(
    tokenizer: Any, path: str | Path, *, max_length: int, limit: int | None = None
) -> Dataset:
    """Cut a text file into rows of ``max_length`` tokens; only a row's first token is unlabelled.

    The loss on a text that the model knew before fine-tuning measures forgetting.

    Args:
        tokenizer: of transformers. No special token is added, and none is read in the text.
        path: a UTF-8 file, plain or compressed.
        max_length: tokens of a row; the last row may be shorter.
        limit: number of rows; None takes all.

    Raises:
        DataError: the file does not exist, cannot be read, or has no text.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(f"no such file: {path}", where="task.chat.forgetting")
    ids = tokenizer(read_text(file), add_special_tokens=False, split_special_tokens=True).input_ids
    rows = [ids[start : start + max_length] for start in range(0, len(ids), max_length)]
    rows = [row for row in rows if len(row) > 1][:limit]
    if not rows:
        raise DataError(f"{path} holds no text", where="task.chat.forgetting")
    return token_rows(rows, [[UNLABELLED, *row[1:]] for row in rows])


def _cut(row: Mapping[str, Any], length: int) -> tuple[list[int], list[int]]:
    """Return ids and labels of at most ``length`` tokens; both are empty if none is labelled."""
    ids, labels = row["input_ids"][:length], row["labels"][:length]
    labels[:1] = [UNLABELLED]  # else the conversation before it would have to predict it
    return (ids, labels) if any(label != UNLABELLED for label in labels) else ([], [])


def _table(rows: Iterator[_Row], length: int) -> Dataset:
    from datasets import concatenate_datasets

    parts = []
    chunk: list[_Row] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == _CHUNK:
            parts.append(_rows(chunk))
            chunk = []
    if chunk:
        parts.append(_rows(chunk))
    if not parts:
        raise DataError(
            f"no row of {length} tokens has a labelled token",
            where="task.max_length",
            fix="raise it: the first answer must begin within a row",
        )
    return concatenate_datasets(parts)


def _rows(chunk: Sequence[_Row]) -> Dataset:
    ids, labels, lengths = (list(column) for column in zip(*chunk, strict=True))
    return token_rows(ids, labels, lengths=lengths)
