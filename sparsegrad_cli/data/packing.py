"""Rows of token ids to batches: padded, packed without attention across, or run together.

A row has ``input_ids`` and ``labels``; a packed row also ``lengths`` of the conversations in it.
What is padding follows from lengths, never from a token's id: a model may use its end token to pad.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from sparsegrad_cli.data.chat_tokens import UNLABELLED, token_rows
from sparsegrad_cli.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

_CHUNK = 1000  # rows made a table at a time
_Row = tuple[list[int], list[int], list[int]]  # ids, labels, lengths of the conversations in it


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """First-fit decreasing: each item, longest first, into the first bin that has room.

    At most 11/9 of the fewest bins possible, and 6/9 of a bin (Dosa 2007). The same lengths always
    give the same bins. O(n log n): a tree over the bins holds the most room in each subtree.

    Args:
        lengths: of the items, none above capacity.
        capacity: of a bin.

    Returns:
        Bins of item numbers, numbers ascending within a bin and bins by their first number, so that
        packing neither sorts a data set by length nor moves a conversation further than it must.

    Raises:
        ValueError: an item fits no bin.
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
    """Conversations side by side in rows of at most ``length`` tokens, none seeing another.

    The collator tells them apart by position ids that start again. A conversation longer than
    ``length`` is cut; one with nothing labelled left is dropped.

    Returns:
        Columns ``input_ids``, ``labels`` and ``lengths`` (int32).

    Raises:
        DataError: nothing is left.
    """
    # Lengths first: token ids are fetched bin by bin and never all held as Python lists.
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
    """The paper's blocks: all conversations run together and cut every ``length`` tokens.

    Attention goes across, and a conversation may go on in the next block. One end token stands
    between two conversations: that of the assistant's last turn or, where a conversation does not
    end in it, one more, unlabelled. The last block is shorter; blocks with nothing labelled are
    left out.

    Raises:
        DataError: nothing is left.
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


def _cut(row: Mapping[str, Any], length: int) -> tuple[list[int], list[int]]:
    """Ids and labels of at most ``length`` tokens, the first unlabelled; empty without a label."""
    ids, labels = row["input_ids"][:length], row["labels"][:length]
    labels[:1] = [UNLABELLED]  # or the conversation before would have to predict it
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
            f"no row of {length} tokens holds one that is to be learnt",
            where="task.max_length",
            fix="longer rows: the first answer must begin within one",
        )
    return concatenate_datasets(parts)


def _rows(chunk: Sequence[_Row]) -> Dataset:
    ids, labels, lengths = (list(column) for column in zip(*chunk, strict=True))
    return token_rows(ids, labels, lengths=lengths)


def make_lm_collator(
    pad_id: int, *, fixed_length: int | None = None, pad_to_multiple_of: int | None = None
) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]:
    """Rows to one batch of int64 tensors, each (batch, length), padded on the right.

    ``input_ids``; ``labels``, -100 where nothing is learnt; ``position_ids``, from 0 in every
    conversation; and ``attention_mask`` of plain rows. Packed rows come without: transformers
    keeps conversations apart where it sees position ids start again and neither a mask nor a
    cache, so a packed batch goes to a model with ``use_cache=False``, as ``lm_loss`` does.

    Args:
        pad_id: any token; the end token does no harm.
        fixed_length: the length of every batch; by default that of the longest row.
        pad_to_multiple_of: round the length up to a multiple (8 suits tensor cores).
    """

    return _LmCollator(pad_id, fixed_length, pad_to_multiple_of)


@dataclass(frozen=True)
class _LmCollator:
    """See :func:`make_lm_collator`. Worker processes can be sent it, as they cannot a closure."""

    pad_id: int
    fixed_length: int | None
    pad_to_multiple_of: int | None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        import torch

        longest = self.fixed_length or max(len(row["input_ids"]) for row in rows)
        multiple = self.pad_to_multiple_of or 1
        shape = (len(rows), -(-longest // multiple) * multiple)
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
            # Padding counts from 0 too: as one more conversation, that nobody sees.
            positions[number, size:] = torch.arange(shape[1] - size)
        batch = {"input_ids": ids, "position_ids": positions, "labels": labels}
        return batch if packed else {**batch, "attention_mask": mask}


def labelled_tokens(batch: Mapping[str, Tensor]) -> int:
    """Tokens of a batch that the loss is a sum over: position t predicts token t + 1."""
    return int((batch["labels"][:, 1:] != UNLABELLED).sum())
