"""Ctrl-C and failed allocations, wherever they happen, as errors of ours. Imports nothing heavy."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from sparsegrad_cli.errors import InterruptedRunError, OutOfMemoryError, SparsegradError

# How libraries say so in a RuntimeError: torch's CPU allocator, C++, CUDA's runtime and cuBLAS.
_PHRASES = (
    "can't allocate memory",
    "not enough memory",
    "bad_alloc",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA out of memory",
)
# oneDNN's words where an allocation fails inside it, and where a CPU lacks an instruction.
_PERHAPS = ("could not create a primitive", "could not create a memory", "could not execute a")


def is_out_of_memory(error: BaseException) -> bool:
    """An allocation failed: on a CUDA device, in torch's CPU allocator, in python or the system."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch and isinstance(error, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(p in str(error) for p in _PHRASES)


def may_be_out_of_memory(error: BaseException) -> bool:
    """It is, or it can be and only a smaller batch can tell."""
    perhaps = isinstance(error, RuntimeError) and any(p in str(error) for p in _PERHAPS)
    return perhaps or is_out_of_memory(error)


def first_line(error: BaseException) -> str:
    """What an error says, on one line."""
    return (str(error).strip().splitlines() or ["an allocation failed"])[0]


@contextmanager
def mapped_errors(
    again: str = "--resume goes on from the last checkpoint, if there is one",
    memory: tuple[str, str] = (
        "train.per_device_train_batch_size",
        "a smaller batch with more gradient_accumulation_steps, "
        "train.gradient_checkpointing: true, a shorter task.max_length",
    ),
) -> Iterator[None]:
    """Ctrl-C and failed allocations as errors of ours, with their exit codes.

    Args:
        again: what to do after Ctrl-C.
        memory: what to blame for a failed allocation, and what to do.
    """
    try:
        yield
    except SparsegradError:
        raise
    except KeyboardInterrupt:
        raise InterruptedRunError("stopped by the user", fix=again) from None
    except Exception as error:
        if is_out_of_memory(error):
            raise OutOfMemoryError(
                f"memory ran out: {first_line(error)}", where=memory[0], fix=memory[1]
            ) from error
        raise
