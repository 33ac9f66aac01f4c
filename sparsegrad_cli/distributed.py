"""One run in several processes, as `torchrun` and `accelerate launch` start them.

Every process does the same work on its share of the data; the first alone writes files and shows
progress. Launchers say in the environment who is who, so that nothing heavy is imported to know it.
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
    """How many processes share the run."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def rank() -> int:
    """Which of them this is, from 0."""
    return int(os.environ.get("RANK") or 0) if world_size() > 1 else 0


def is_rank_zero() -> bool:
    """Whether this process writes files and shows progress."""
    return rank() == 0


def raise_on_rank_zero(error: SparsegradError) -> NoReturn:
    """End what every process finds wrong by itself, and say it once.

    Raises:
        SparsegradError: ``error``, in the first process. The others leave without a word.
    """
    if is_rank_zero():
        raise error
    raise SystemExit(error.exit_code)


def init(*, use_cpu: bool) -> None:
    """Meet the other processes, and take the device that is this one's; nothing to do alone.

    Before anything is computed: transformers' Trainer would do it only when it is made.
    """
    if world_size() > 1:
        from accelerate import PartialState

        # transformers hands on what we say of buffers in a word that torch has since renamed.
        warnings.filterwarnings("ignore", ".broadcast_buffers. is deprecated", FutureWarning)
        PartialState(cpu=use_cpu)


def shutdown() -> None:
    """Part from the others at the end of a run that went well."""
    if world_size() > 1:
        import torch.distributed

        if torch.distributed.is_initialized():
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()


def barrier() -> None:
    """Until all are here."""
    if world_size() > 1:
        import torch.distributed

        torch.distributed.barrier()


def from_rank_zero(make: Callable[[], _Made]) -> _Made:
    """What the first process makes, in all of them.

    Raises:
        Exception: of ``make``, in the first process. The others leave without a word.
    """
    if world_size() == 1:
        return make()
    import torch.distributed

    told: list[Any] = [None, 0]  # what was made; the exit code, if it was not
    failure: Exception | None = None
    if is_rank_zero():
        try:
            told[0] = make()
        except Exception as error:  # whatever it is, the others must not wait for ever
            failure = error
            told[1] = error.exit_code if isinstance(error, SparsegradError) else 1
    torch.distributed.broadcast_object_list(told, src=0)
    if failure is not None:
        raise failure
    if told[1]:
        raise SystemExit(told[1])
    made: _Made = told[0]
    return made


def all_gather(own: _Made) -> list[_Made]:
    """What each process has, in all of them, the first one's first."""
    if world_size() == 1:
        return [own]
    import torch.distributed

    found: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(found, own)
    return found


def any(said: bool) -> bool:
    """Whether any of the processes says so; all have to ask."""
    if world_size() == 1:
        return said
    import torch.distributed
    from accelerate import PartialState

    told = torch.tensor(int(said), device=PartialState().device)
    torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
    return bool(told)


def gradient_bytes(wrapped: Any) -> int | None:
    """Bytes of gradients that each process gives to be summed in a step: what DDP's buckets hold.

    Args:
        wrapped: the model as accelerate has wrapped it for training.

    Returns:
        None alone, and where it is not DDP that sums.
    """
    from torch.nn.parallel import DistributedDataParallel

    if not isinstance(wrapped, DistributedDataParallel):
        return None
    facts = wrapped._get_ddp_logging_data()
    # Buckets are made anew after the first step, in the order in which gradients came.
    sizes = facts.get("rebuilt_bucket_sizes") or facts["bucket_sizes"]
    return sum(int(size) for size in str(sizes).split(","))


def all_reduce(tensors: Iterable[Tensor]) -> None:
    """Sum over the processes, in place; nothing to do alone."""
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)


def broadcast(tensors: Iterable[Tensor]) -> None:
    """The first process's values in all of them, in place; nothing to do alone."""
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for tensor in tensors:
            dense = tensor.contiguous()
            torch.distributed.broadcast(dense, src=0)
            if dense is not tensor:
                tensor.copy_(dense)
