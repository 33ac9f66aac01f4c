"""A process group of any size in one process, whose collectives send nothing.

Uses a private module of torch, checked with torch 2.13.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed

from sparsegrad_cli.errors import SparsegradError, UsageError

_CHECKED = "2.13"


@contextmanager
def fake_processes(count: int) -> Iterator[None]:
    """Make this process rank zero of ``count`` processes, of which there are no others.

    Collectives check shapes and return at once. Rank zero holds the most: where the rows of a
    tensor are not a multiple of ``count``, the first processes have one more.

    Raises:
        UsageError: this process has been started by torchrun or accelerate, and has joined others.
        SparsegradError: this version of torch was not checked.
    """
    if not torch.__version__.startswith(f"{_CHECKED}."):
        raise SparsegradError(
            f"processes are simulated with a private part of torch {_CHECKED}, "
            f"and this is torch {torch.__version__}",
            where="--processes",
            fix=f'use an environment with it: pip install "torch=={_CHECKED}.*"',
        )
    if torch.distributed.is_initialized():
        raise UsageError(
            "this process belongs to a group of real processes, and cannot simulate another one",
            where="--processes",
            fix="run it without torchrun or accelerate launch",
        )
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
