"""Tensors that are split over processes: made whole to be written, split again when read.

A module that FSDP2 (torch's ``fully_shard``) has split holds every parameter as a DTensor, cut
along its first dimension. To make one whole is a collective: all processes ask, in one order. With
nothing split, all of this is the plain thing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sparsegrad_cli import distributed

_Out = TypeVar("_Out")


def is_split(tensor: Any) -> bool:
    """Whether this process holds a shard of it."""
    if not _joined():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _joined() -> bool:
    """Whether anything can be split: a process that was launched alone may be, too."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of it."""
    found: Any = tensor
    return found.to_local() if is_split(tensor) else tensor


def reshard(model: nn.Module) -> None:
    """Leave every process with nothing but its shards.

    After a forward pass without a backward pass the last modules are still whole: their parameters
    are then copies, and what is written into a copy is lost.
    """
    for module in split_modules(model):
        module.reshard()


def split_modules(model: nn.Module) -> list[Any]:
    """Modules whose parameters FSDP2 splits: those it was asked to split, not what they hold."""
    if not _joined():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def gather(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors. Of one that is split the first process gets a copy on the CPU, the others its
    shape alone (a meta tensor)."""
    return {name: _whole(tensor) for name, tensor in tensors.items()}


def _whole(tensor: Any) -> Tensor:
    if is_split(tensor):
        whole = tensor.full_tensor()
    elif hasattr(tensor, "ds_id") or hasattr(tensor, "_hp_mapping"):
        whole = _from_engine(tensor)
    else:
        whole = tensor
    kept: Tensor = whole.detach()
    return kept if whole is tensor else kept.to("cpu" if distributed.is_rank_zero() else "meta")


def _from_engine(parameter: Any) -> Tensor:
    """A parameter that DeepSpeed's ZeRO has split, in float32.

    Raises:
        RuntimeError: the engine gave something else.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    whole = safe_get_full_fp32_param(parameter)
    shape = getattr(parameter, "ds_shape", parameter.shape)
    if not isinstance(whole, Tensor) or whole.shape != shape:
        raise RuntimeError(f"DeepSpeed did not give back a parameter of shape {tuple(shape)}")
    return whole


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's shard of a whole tensor, split as ``like`` is; the tensor where that is whole.

    No collective: every process has read the same file.
    """
    if not is_split(like) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    moved = tensor.to(like.device)
    return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None)


def call_as_forward(module: nn.Module, compute: Callable[..., _Out], *inputs: Tensor) -> _Out:
    """``compute(*inputs)`` as if it were the module's forward.

    What hangs on the module's forward pass happens around it: the parameters of a split module are
    whole inside and nowhere else.
    """
    plain = module.__dict__.get("forward")
    module.forward = compute
    try:
        out: _Out = module(*inputs)
    finally:
        if plain is None:
            del module.forward
        else:
            module.forward = plain
    return out
