"""A run that goes on from a checkpoint of anybody's: what fails before its first step is blamed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from sparsegrad_cli.errors import FileFormatError, SparsegradError
from sparsegrad_cli.io.bounded_json import plain_json

_NONE = type(None)
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("global_step", "max_steps", "num_train_epochs"), (int,)),
    **dict.fromkeys(("epoch", "eval_steps", "logging_steps", "save_steps"), (int, float)),
    **dict.fromkeys(("train_batch_size", "best_global_step"), (int, _NONE)),
    **dict.fromkeys(("total_flos", "num_input_tokens_seen"), (int, float)),
    "best_metric": (int, float, _NONE),
    "log_history": (list,),
    "stateful_callbacks": (dict,),
}


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
    if folder is not None:
        _check_state(folder / "trainer_state.json")
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


def _check_state(path: Path) -> None:
    """Refuse what transformers takes as it is, and stumbles over after the first step.

    Raises:
        FileFormatError: missing, damaged, or a value of another kind.
    """
    fix = "take the checkpoint away: --resume goes on from the one before, or begins anew"
    try:
        state = plain_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise FileFormatError(f"cannot be read: {error}", where=str(path), fix=fix) from error
    state = state if isinstance(state, dict) else {"log_history": None}
    for key, kinds in _KINDS.items():
        value = state.get(key, 0 if int in kinds else [] if list in kinds else {})
        negative = isinstance(value, int | float) and value < 0 and key != "best_metric"
        if not isinstance(value, kinds) or isinstance(value, bool) or negative:
            raise FileFormatError(f"{key} cannot be {value!r:.40}", where=str(path), fix=fix)


def check_measured(measured: Any) -> dict[str, Any]:
    """What a checkpoint says of times and memory, if they can be added to.

    Raises:
        TypeError: they cannot.
    """
    durations = measured.get("steps_s", []) if isinstance(measured, dict) else None
    numbers = [*durations, measured.get("train_s", 0.0)] if isinstance(durations, list) else [None]
    if not all(isinstance(number, int | float) and 0 <= number < 1e12 for number in numbers):
        raise TypeError("its times are no numbers of seconds")
    if not isinstance(measured.get("memory", {}), dict):
        raise TypeError("its memory is no record")
    return dict(measured)


def _of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(
        words in str(error).lower() for words in ("out of memory", "allocate memory")
    )
