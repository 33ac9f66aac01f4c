"""Plain text that a model knew before: what fine-tuning costs it there is forgetting."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsegrad_cli.data.chat_tokens import UNLABELLED, token_rows
from sparsegrad_cli.data.text_files import read_text
from sparsegrad_cli.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset


def plain_text_rows(
    tokenizer: Any, path: str | Path, *, max_length: int, limit: int | None = None
) -> Dataset:
    """A text file cut into rows of max_length tokens, every token labelled but a row's first.

    The same rows before and after training, whatever the method: what changes is the model.

    Args:
        tokenizer: of transformers. No special token is added and none is read in the text.
        path: UTF-8, plain or gzip.
        max_length: tokens of a row; the last may be shorter.
        limit: the first n rows.

    Raises:
        DataError: no such file, no text in it, or it cannot be read.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(f"no such file: {path}", where="task.chat.forgetting")
    ids = tokenizer(read_text(file), add_special_tokens=False, split_special_tokens=True).input_ids
    starts = range(0, len(ids), max_length)
    rows = [ids[start : start + max_length] for start in starts]
    rows = [row for row in rows if len(row) > 1][:limit]
    if not rows:
        raise DataError(f"{path} holds no text", where="task.chat.forgetting")
    return token_rows(rows, [[UNLABELLED, *row[1:]] for row in rows])
