"""Turn texts into token ids."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from sparsegrad_cli.data.examples import TextData
from sparsegrad_cli.errors import DataError, UsageError

if TYPE_CHECKING:
    from datasets import Dataset

_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_CHUNK = 5000  # rows that are tokenized at a time, to bound the memory of Python lists


def tokenize(
    task: TextData,
    tokenizer: Any,
    *,
    max_length: int,
    padding: Literal["dynamic", "fixed"],
) -> tuple[Dataset, dict[str, Dataset], str | None]:
    """Tokenize every split.

    Args:
        task: with columns ``text``, ``text_pair`` and ``label``.
        tokenizer: of transformers; fixed padding needs a pad token (:func:`ensure_pad_token`).
        max_length: tokens kept of an example, special tokens included; of two texts the longer
            is cut first.
        padding: ``dynamic`` leaves rows at their own length for the collator to pad; ``fixed``
            pads every row to ``max_length``.

    Returns:
        The training set, the validation and test sets by name, and a note if rows are cut. Columns:
        ``input_ids``
        (int32), ``attention_mask`` (int8), ``token_type_ids`` (int8, if the tokenizer has them)
        and ``labels`` (int64 or float32).

    Raises:
        DataError: ``max_length`` leaves no room beside the special tokens, or a text has no token.
    """
    encoder = TextEncoder(
        tokenizer, pair=task.spec.has_pair, max_length=max_length, padding=padding
    )
    sets = {"training": task.train, **task.validation, **task.test}
    done: dict[str, Dataset] = {}
    cut = []
    for name, data in sets.items():
        done[name], count = _tokenize_split(data, name, encoder)
        if count:
            cut.append(f"{count} of {len(data)} {name} rows")
    note = f"cut to {max_length} tokens (task.max_length): {', '.join(cut)}" if cut else None
    return done.pop("training"), done, note


class TextEncoder:
    """Turn texts, or pairs of texts, into token ids.

    Args:
        tokenizer, max_length, padding: as in :func:`tokenize`.
        pair: whether an example has two texts.

    Attributes:
        special: number of special tokens in every example.

    Raises:
        DataError: ``max_length`` leaves no room beside the special tokens.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        pair: bool,
        max_length: int,
        padding: Literal["dynamic", "fixed"],
    ) -> None:
        self.special = int(tokenizer.num_special_tokens_to_add(pair=pair))
        if max_length <= self.special:
            # With less room than that, tokenizers do not truncate at all.
            raise DataError(
                f"max_length {max_length} is too small: the tokenizer adds {self.special} special "
                f"tokens to {'a pair' if pair else 'a text'}, so every sequence is truncated to "
                "nothing",
                where="task.max_length",
                fix=f"set it to at least {self.special + 1}; 128 is usual",
            )
        self._tokenizer, self._max_length = tokenizer, max_length
        self._options = {
            "truncation": True,
            "max_length": max_length,
            "padding": "max_length" if padding == "fixed" else False,
            "return_attention_mask": True,
        }

    def encode(self, *texts: list[str]) -> tuple[dict[str, list[list[int]]], list[int]]:
        """Return the model's inputs by name, and the positions of the examples that were cut.

        Args:
            texts: the first texts, and the second ones if examples have two.
        """
        encoded = self._tokenizer(*texts, **self._options)
        columns = {name: encoded[name] for name in _INPUTS if name in encoded}
        lengths = (sum(mask) for mask in columns["attention_mask"])
        full = [at for at, length in enumerate(lengths) if length == self._max_length]
        return columns, self._cut(texts, encoded, full)

    def _cut(self, texts: tuple[list[str], ...], encoded: Any, full: list[int]) -> list[int]:
        """Return which of the examples ``full``, which have ``max_length`` tokens, were cut."""
        if encoded.encodings is not None:
            return [at for at in full if encoded.encodings[at].overflowing]
        # A tokenizer in Python does not say which examples it cut.
        cut = []
        for at in full:
            whole = self._tokenizer(*(part[at] for part in texts), truncation=False, verbose=False)
            if len(whole["input_ids"]) > sum(encoded["attention_mask"][at]):
                cut.append(at)
        return cut


def _tokenize_split(data: Dataset, split: str, encoder: TextEncoder) -> tuple[Dataset, int]:
    """Tokenize one split, and count its rows that are longer than ``max_length``."""
    from datasets import Dataset, Features, List, Value, concatenate_datasets

    parts = []
    longest = cut = 0
    for start in range(0, len(data), _CHUNK):
        rows = data[start : start + _CHUNK]
        texts = [rows["text"], rows["text_pair"]] if "text_pair" in rows else [rows["text"]]
        columns, cut_here = encoder.encode(*texts)
        lengths = [sum(mask) for mask in columns["attention_mask"]]
        if min(lengths) == 0:
            row = start + lengths.index(0) + 1
            raise DataError(f"row {row} of the {split} split has no token", where="task")
        cut += len(cut_here)
        longest = max(longest, *lengths)
        features: dict[str, Any] = {name: List(Value("int8")) for name in columns}
        features["input_ids"] = List(Value("int32"))
        features["labels"] = data.features["label"]
        parts.append(
            Dataset.from_dict({**columns, "labels": rows["label"]}, features=Features(features))
        )
    if longest <= encoder.special:
        raise DataError(
            f"every sequence of the {split} split holds nothing but the {encoder.special} special "
            "tokens",
            where="task",
            fix="are the text columns the right ones, and does the tokenizer fit their language?",
        )
    return concatenate_datasets(parts), cut


def ensure_pad_token(tokenizer: Any, model_config: Any = None) -> str | None:
    """Make the end token the pad token of a tokenizer and a model configuration without one.

    LLaMA and GPT-2 have no pad token. Their classifiers read the last token that is not padding,
    and refuse batches if the configuration names no pad token.

    Returns:
        A note if something was changed, else None.

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


def fitting_length(wanted: int, config: Any) -> tuple[int, str | None]:
    """Return ``wanted``, or the number of positions that a model has if that is less.

    Args:
        wanted: tokens of an example, as ``task.max_length`` says.
        config: configuration of the model.

    Returns:
        The length, and a note if it is less than ``wanted``.
    """
    positions = getattr(config, "max_position_embeddings", None)
    kind = getattr(config, "model_type", "")
    # Positions of RoBERTa start behind the id of its pad token.
    offset = 2 if kind in ("roberta", "xlm-roberta", "camembert") else 0
    if isinstance(positions, int) and positions > 0 and wanted > positions - offset:
        room = positions - offset
        return room, f"max_length {wanted} cut to the model's {room} positions"
    return wanted, None
