"""Run in several processes, started by `torchrun` or `accelerate launch`.

Every process does the same work on its share of the data. Only rank zero writes files and shows
progress. The launcher sets rank and world size in environment variables, so this module need not
import torch to read them. With a single process, the collective functions do not communicate.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from sparsegrad_cli.errors import SparsegradError

if TYPE_CHECKING:
    from torch import Tensor

_Made = TypeVar("_Made")


def world_size() -> int:
    """Return the number of processes of the run."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def rank() -> int:
    """Return the rank of this process, from 0."""
    return int(os.environ.get("RANK") or 0) if world_size() > 1 else 0


def is_rank_zero() -> bool:
    """Return whether this process writes files and shows progress."""
    return rank() == 0


@contextmanager
def errors_on_rank_zero() -> Iterator[None]:
    """Raise an error that every process finds by itself on rank zero only.

    Raises:
        SparsegradError: On rank zero.
        SystemExit: In the other processes, with the error's exit code.
    """
    try:
        yield
    except SparsegradError as error:
        if is_rank_zero():
            raise
        raise SystemExit(error.exit_code) from None


def init(*, use_cpu: bool) -> None:
    """Join the process group and choose the device of this process. Call it before computing."""
    if world_size() > 1:
        from accelerate import PartialState

        # accelerate passes this setting to DDP under a name that torch has deprecated.
        warnings.filterwarnings("ignore", ".broadcast_buffers. is deprecated", FutureWarning)
        PartialState(cpu=use_cpu)


def shutdown() -> None:
    """Leave the process group at the end of a run that succeeded."""
    if world_size() > 1:
        import torch.distributed

        if torch.distributed.is_initialized():
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()


def barrier() -> None:
    """Wait until all processes have reached this call."""
    if world_size() > 1:
        import torch.distributed

        torch.distributed.barrier()


def from_rank_zero(make: Callable[[], _Made]) -> _Made:
    """Call ``make`` on rank zero and return its result in all processes.

    Raises:
        Exception: The error of ``make``, on rank zero.
        SystemExit: In the other processes, with the error's exit code, so that they do not wait
            forever.
    """
    if world_size() == 1:
        return make()
    import torch.distributed

    content: list[Any] = [None, 0]  # The result; the exit code if there is none.
    failure: Exception | None = None
    if is_rank_zero():
        try:
            content[0] = make()
        except Exception as error:
            failure = error
            content[1] = error.exit_code if isinstance(error, SparsegradError) else 1
    torch.distributed.broadcast_object_list(content, src=0)
    if failure is not None:
        raise failure
    if content[1]:
        raise SystemExit(content[1])
    made: _Made = content[0]
    return made


def all_gather(own: _Made) -> list[_Made]:
    """Return the objects of all processes, in the order of their ranks."""
    if world_size() == 1:
        return [own]
    import torch.distributed

    found: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(found, own)
    return found


def any(condition: bool) -> bool:
    """Return whether the condition holds in any process. All processes must call it."""
    if world_size() == 1:
        return condition
    import torch.distributed
    from accelerate import PartialState

    found = torch.tensor(int(condition), device=PartialState().device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return bool(found)


def all_reduce(tensors: Iterable[Tensor]) -> None:
    """Sum tensors over the processes, in place."""
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Copy the tensors of rank zero to all processes, in place."""
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for tensor in tensors:
            dense = tensor.contiguous()
            torch.distributed.broadcast(dense, src=0)
            if dense is not tensor:
                tensor.copy_(dense)
