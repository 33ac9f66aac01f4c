"""A run in several processes, as `torchrun` and `accelerate launch` start them.

Every process does the same work on its share of the data; only the first one writes files and shows
progress. The launcher says in environment variables which process is which, so nothing heavy is
imported to find out. With a single process, every function here does nothing.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from sparsegrad_cli.errors import SparsegradError

if TYPE_CHECKING:
    from torch import Tensor

_Made = TypeVar("_Made")


def world_size() -> int:
    """Return the number of processes of the run."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def rank() -> int:
    """Return the number of this process, from 0."""
    return int(os.environ.get("RANK") or 0) if world_size() > 1 else 0


def is_rank_zero() -> bool:
    """Return whether this process writes files and shows progress."""
    return rank() == 0


def raise_on_rank_zero(error: SparsegradError) -> NoReturn:
    """Raise an error that every process has found by itself in the first process only.

    Raises:
        SparsegradError: ``error``, in the first process.
        SystemExit: With the error's exit code, in the others.
    """
    if is_rank_zero():
        raise error
    raise SystemExit(error.exit_code)


def init(*, use_cpu: bool) -> None:
    """Join the process group and choose this process's device, before anything is computed."""
    if world_size() > 1:
        from accelerate import PartialState

        # accelerate passes our choice on to DDP under a name that torch has since replaced.
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
    """Wait until all processes are here."""
    if world_size() > 1:
        import torch.distributed

        torch.distributed.barrier()


def from_rank_zero(make: Callable[[], _Made]) -> _Made:
    """Call ``make`` in the first process and return its result in all of them.

    Raises:
        Exception: Of ``make``, in the first process.
        SystemExit: With its exit code, in the others: they must not wait forever.
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
    """Return every process's object, in the order of the processes."""
    if world_size() == 1:
        return [own]
    import torch.distributed

    found: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(found, own)
    return found


def any(condition: bool) -> bool:
    """Return whether the condition holds in any process. All processes have to call it."""
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
    """Copy the first process's tensors to all processes, in place."""
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for tensor in tensors:
            dense = tensor.contiguous()
            torch.distributed.broadcast(dense, src=0)
            if dense is not tensor:
                tensor.copy_(dense)
