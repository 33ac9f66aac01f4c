"""Map Ctrl-C and failed allocations to the package's own errors. Imports nothing heavy."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from sparsegrad_cli.errors import InterruptedRunError, OutOfMemoryError, SparsegradError

# Messages of a RuntimeError that means a failed allocation: of torch's CPU allocator, C++, the CUDA
# runtime, cuBLAS, and oneDNN.
_PHRASES = (
    "can't allocate memory",
    "not enough memory",
    "bad_alloc",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA out of memory",
    "could not create a primitive",
    "could not create a memory",
    "could not execute a primitive",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocation failed: in CUDA, torch, oneDNN, Python or the OS."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch and isinstance(error, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(p in str(error) for p in _PHRASES)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where there is none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def mapped_errors(
    again: str = "--resume continues from the last checkpoint, if there is one",
    memory: tuple[str, str] = (
        "train.per_device_train_batch_size",
        "a smaller batch with more gradient_accumulation_steps, "
        "train.gradient_checkpointing: true, a shorter task.max_length",
    ),
) -> Iterator[None]:
    """Raise Ctrl-C and failed allocations inside as errors with their own exit codes.

    Args:
        again: What to do after Ctrl-C.
        memory: The setting that memory depends on, and what to do after a failed allocation.

    Raises:
        InterruptedRunError: The user pressed Ctrl-C.
        OutOfMemoryError: An allocation failed.
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
