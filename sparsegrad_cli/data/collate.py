"""Texts to token ids, and rows of token ids to padded batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from sparsegrad_cli.data.load_task import LoadedTask
from sparsegrad_cli.errors import DataError, UsageError

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_CHUNK = 5000  # rows tokenized at a time: bounds the memory that Python lists take


def tokenize(
    task: LoadedTask,
    tokenizer: Any,
    *,
    max_length: int,
    padding: Literal["dynamic", "fixed"],
    notes: list[str] | None = None,
) -> tuple[Dataset, dict[str, Dataset]]:
    """Token ids of every split.

    Args:
        task: with columns text, text_pair, label.
        tokenizer: of transformers; needs a pad token for fixed padding (ensure_pad_token).
        max_length: tokens kept of an example, special tokens included; of two texts the longer
            is cut first.
        padding: ``dynamic`` leaves rows at their own length for the collator to pad; ``fixed``
            pads every row to max_length here.
        notes: gets a note on how many rows are cut to max_length.

    Returns:
        train and validation sets with columns ``input_ids`` (int32), ``attention_mask`` (int8),
        ``token_type_ids`` (int8, where the tokenizer has them) and ``labels`` (int64 or float32).

    Raises:
        DataError: max_length leaves no room beside the special tokens, or a text has no tokens.
    """
    pair = task.spec.has_pair
    special = int(tokenizer.num_special_tokens_to_add(pair=pair))
    if max_length <= special:
        # Checked first: with less room than that, tokenizers do not truncate at all.
        raise DataError(
            f"max_length {max_length} is too small: the tokenizer adds {special} special tokens "
            f"to {'a pair' if pair else 'a text'}, so every sequence is truncated to nothing",
            where="task.max_length",
            fix=f"at least {special + 1}; 128 is usual",
        )
    options = {
        "truncation": True,
        "max_length": max_length,
        "padding": "max_length" if padding == "fixed" else False,
        "return_attention_mask": True,
    }
    sets = {"training": task.train, **task.validation}
    cut: dict[str, int] = {}
    done = {
        name: _tokenize_split(data, name, tokenizer, special, options, cut)
        for name, data in sets.items()
    }
    rows = [f"{count} of {len(sets[name])} {name} rows" for name, count in cut.items() if count]
    if rows and notes is not None:
        notes.append(f"cut to {max_length} tokens (task.max_length): {', '.join(rows)}")
    train = done.pop("training")
    return train, done


def _tokenize_split(
    data: Dataset,
    split: str,
    tokenizer: Any,
    special: int,
    options: dict[str, Any],
    cut: dict[str, int],
) -> Dataset:
    """Tokenize one split, and count in ``cut`` its rows that are longer than max_length."""
    from datasets import Dataset, Features, List, Value, concatenate_datasets

    parts = []
    longest = 0
    for start in range(0, len(data), _CHUNK):
        rows = data[start : start + _CHUNK]
        texts = [rows["text"], rows["text_pair"]] if "text_pair" in rows else [rows["text"]]
        encoded = tokenizer(*texts, **options)
        columns = {name: encoded[name] for name in _INPUTS if name in encoded}
        lengths = [sum(mask) for mask in columns["attention_mask"]]
        if min(lengths) == 0:
            row = start + lengths.index(0) + 1
            raise DataError(f"row {row} of the {split} split gives no token at all", where="task")
        full = [at for at, length in enumerate(lengths) if length == options["max_length"]]
        cut[split] = cut.get(split, 0) + _cut_rows(tokenizer, texts, encoded, full)
        longest = max(longest, *lengths)
        features = {name: List(Value("int8")) for name in columns}
        features["input_ids"] = List(Value("int32"))
        features["labels"] = data.features["label"]
        columns["labels"] = rows["label"]
        parts.append(Dataset.from_dict(columns, features=Features(features)))
    if longest <= special:
        raise DataError(
            f"every sequence of the {split} split holds nothing but the {special} special tokens",
            where="task",
            fix="are the text columns the right ones, and does the tokenizer fit their language?",
        )
    return concatenate_datasets(parts)


def _cut_rows(tokenizer: Any, texts: list[list[str]], encoded: Any, full: list[int]) -> int:
    """Count which of the rows ``full``, whose tokens are max_length, had more of them."""
    if encoded.encodings is not None:
        return sum(bool(encoded.encodings[at].overflowing) for at in full)
    # A tokenizer written in Python does not say what it cut.
    count = 0
    for at in full:
        whole = tokenizer(*(part[at] for part in texts), truncation=False, verbose=False)
        present = sum(encoded["attention_mask"][at])
        count += len(whole["input_ids"]) > present
    return count


def make_collator(
    tokenizer: Any,
    *,
    max_length: int,
    padding: Literal["dynamic", "fixed"],
    pad_to_multiple_of: int | None = None,
) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
    """Rows of tokenize() -> one batch of tensors, each (batch, length); labels (batch,).

    Args:
        tokenizer: with a pad token (ensure_pad_token); its padding side is kept.
        max_length: the length of every batch with fixed padding.
        padding: ``dynamic`` pads to the batch's longest row, ``fixed`` to max_length.
        pad_to_multiple_of: round the length up to a multiple (8 suits tensor cores).
    """
    from transformers import DataCollatorWithPadding

    fixed = padding == "fixed"
    collator = DataCollatorWithPadding(
        tokenizer,
        padding="max_length" if fixed else "longest",
        max_length=max_length if fixed else None,
        pad_to_multiple_of=pad_to_multiple_of,
    )
    return _PaddingCollator(collator)


@dataclass(frozen=True)
class _PaddingCollator:
    """A collator that worker processes can be sent (a closure cannot be pickled)."""

    collator: Callable[[list[dict[str, Any]]], Mapping[str, Tensor]]

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return dict(self.collator(rows))


def ensure_pad_token(tokenizer: Any, model_config: Any = None) -> str | None:
    """Give a tokenizer (and model configuration) without a pad token the end token as one.

    LLaMA and GPT-2 come without. Their classifiers read the last token that is not padding and
    refuse batches where the configuration names no pad token.

    Returns:
        A note where something was changed, else None.

    Raises:
        UsageError: there is no end token either.
    """
    changed = []
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UsageError(
                "the tokenizer has neither a pad token nor an end token",
                where="model.name",
                fix="set pad_token in its tokenizer_config.json",
            )
        tokenizer.pad_token = tokenizer.eos_token
        changed.append("tokenizer")
    if model_config is not None and getattr(model_config, "pad_token_id", None) is None:
        model_config.pad_token_id = tokenizer.pad_token_id
        changed.append("model")
    if not changed:
        return None
    return f"the {' and the '.join(changed)} had no pad token: {tokenizer.pad_token!r} is used"


def longest_batch(dataset: Dataset, size: int) -> list[dict[str, Any]]:
    """The ``size`` rows with the most input_ids, longest first: the worst case for memory.

    Fewer where the data set is smaller; of equal lengths the first in order.
    """
    import pyarrow.compute as pc

    if size < 1:
        raise ValueError(f"size is {size}, it must be at least 1")
    table = dataset.select_columns(["input_ids"]).with_format("arrow")[:]
    lengths = pc.list_value_length(table["input_ids"]).to_pylist()
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    return [dataset[row] for row in order[:size]]
