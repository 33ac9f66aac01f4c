"""A run that goes on from a checkpoint of anybody's: what fails before its first step is blamed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from sparsegrad_cli.errors import FileFormatError, SparsegradError


class _FirstStep(TrainerCallback):
    """Knows whether an optimizer step has been made, or training has ended without one."""

    made = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.made = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.made = True


@contextmanager
def blaming_checkpoint(folder: Path | None, trainer: Any) -> Iterator[None]:
    """Around ``trainer.train``: what a checkpoint's files make fail is their fault.

    Tensors, states and numbers in them are those of another model, or of nobody's, where they do
    not load, or where the first step cannot be made with them.

    Args:
        folder: that training goes on from; None blames nobody.

    Raises:
        FileFormatError: says how it failed.
    """
    first = _FirstStep()
    trainer.add_callback(first)
    try:
        yield
    except SparsegradError:
        raise
    except Exception as error:
        if folder is None or first.made or _of_memory(error):
            raise
        reason = (str(error).strip().splitlines() or [""])[0]
        raise FileFormatError(
            f"the run cannot go on from {folder.name}: {type(error).__name__}: {reason}",
            where=str(folder),
            fix="take the folder away: --resume goes on from the one before, or begins anew",
        ) from error


def _of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(
        words in str(error).lower() for words in ("out of memory", "allocate memory")
    )
