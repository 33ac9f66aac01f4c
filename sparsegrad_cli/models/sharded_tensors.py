"""Gather tensors that are sharded over processes, and shard them again.

A module that FSDP2 (torch's ``fully_shard``) shards holds each parameter as a DTensor, split along
its first dimension. Gathering is a collective: all processes call it in the same order. Tensors
that are not sharded pass through unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sparsegrad_cli import distributed

_Out = TypeVar("_Out")


def is_split(tensor: Any) -> bool:
    """Return whether this process holds only a shard of a tensor."""
    if not _joined():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _joined() -> bool:
    """Return whether a process group exists. It may consist of one process."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def local_part(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds."""
    sharded: Any = tensor
    return sharded.to_local() if is_split(tensor) else tensor


def reshard(model: nn.Module) -> None:
    """Free the gathered parameters, so that every process holds its shards only.

    After a forward pass without a backward pass, the last modules are still gathered. Their
    parameters are then copies, and a value written into a copy is lost.
    """
    for module in split_modules(model):
        module.reshard()


def split_modules(model: nn.Module) -> list[Any]:
    """Return the modules that ``fully_shard`` was applied to, without their submodules."""
    if not _joined():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def gather(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gather sharded tensors; a collective.

    Args:
        tensors: Tensors by name, sharded or not.

    Returns:
        Whole tensors by name, detached. A tensor that was sharded becomes a copy on the CPU in
        process zero, and a meta tensor of the whole shape in the others.
    """
    return {name: _whole(tensor) for name, tensor in tensors.items()}


def _whole(tensor: Any) -> Tensor:
    if is_split(tensor):
        whole = tensor.full_tensor()
    elif hasattr(tensor, "ds_id") or hasattr(tensor, "get_full_hp_param"):
        whole = _from_engine(tensor)
    else:
        whole = tensor
    detached: Tensor = whole.detach()
    if whole is tensor:
        return detached
    return detached.to("cpu" if distributed.is_rank_zero() else "meta")


def _from_engine(parameter: Any) -> Tensor:
    """Gather a parameter that DeepSpeed's ZeRO has partitioned, in float32.

    Raises:
        RuntimeError: DeepSpeed returned another shape, or not a tensor.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    whole = safe_get_full_fp32_param(parameter)
    shape = getattr(parameter, "ds_shape", parameter.shape)
    if not isinstance(whole, Tensor) or whole.shape != shape:
        raise RuntimeError(f"DeepSpeed did not return a parameter of shape {tuple(shape)}")
    return whole


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this process's shard of a whole tensor.

    This is not a collective: every process has read the same file.

    Args:
        tensor: The whole tensor.
        like: The tensor whose sharding is followed. If it is not sharded, or has another shape,
            ``tensor`` is returned unchanged.
    """
    if not is_split(like) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    moved = tensor.to(like.device)
    return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None)


def call_as_forward(module: nn.Module, compute: Callable[..., _Out], *inputs: Tensor) -> _Out:
    """Return ``compute(*inputs)``, run in place of the module's forward.

    The hooks of the module run around it. The parameters of a sharded module are whole only there.

    Args:
        module: The module whose forward is replaced during the call.
        compute: The function to run.
        inputs: Its arguments.
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
