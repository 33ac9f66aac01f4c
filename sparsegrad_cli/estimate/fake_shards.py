"""Share a fake model over fake processes as accelerate does in a run.

accelerate and torch do the sharding themselves: FSDP2's units, its gathers and their order, and
DDP's buckets are theirs. The fake process group (:mod:`sparsegrad_cli.estimate.fake_processes`)
must be open.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.distributed
from torch import Tensor, nn

from sparsegrad_cli.models.targets import Target
from sparsegrad_cli.recipe.schema import TrainSection
from sparsegrad_cli.training.accelerator import configure_fsdp, ddp_options

Shard = Literal["ddp", "fsdp2"]
_MESH = ("dp_shard",)


def process_mesh() -> Any:
    """Return the mesh of all processes, for FSDP2. It holds numbers: make it of real tensors.

    It is of CPUs, where fake tensors are, also where torch would choose GPUs.
    """
    from torch.distributed.device_mesh import init_device_mesh

    size = torch.distributed.get_world_size()
    return init_device_mesh("cpu", (size,), mesh_dim_names=_MESH)


def share(
    model: nn.Module,
    targets: Sequence[Target],
    train: TrainSection,
    mesh: Any | None,
) -> nn.Module:
    """Return the model as a process of a distributed run has it.

    Args:
        model: prepared by its method; FSDP2 changes it in place.
        targets: the target modules.
        train: the recipe's section.
        mesh: shard the weights over it by FSDP2; None for whole weights in each process, by DDP.
    """
    if mesh is None:
        return _by_ddp(model, train)
    return _by_fsdp(model, targets, train, mesh)


def _by_fsdp(
    model: nn.Module, targets: Sequence[Target], train: TrainSection, mesh: Any
) -> nn.Module:
    """Let accelerate shard the model, with the options of configs/accelerate/fsdp2.yaml."""
    from accelerate.utils import FullyShardedDataParallelPlugin, fsdp2_prepare_model

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
    )
    configure_fsdp(plugin, model, targets)
    accelerator = SimpleNamespace(  # What accelerate reads of an Accelerator here.
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="bf16" if train.bf16 else "no",
        is_main_process=False,
        parallelism_config=SimpleNamespace(fsdp_dim_names=_MESH),
        torch_device_mesh=mesh,
    )
    sharded: nn.Module = fsdp2_prepare_model(accelerator, model)
    return sharded


def _by_ddp(model: nn.Module, train: TrainSection) -> nn.Module:
    """Wrap the model in DDP, without the first exchange of weights, which reads values."""
    with warnings.catch_warnings():
        # torch has deprecated the name of an option that accelerate passes, too.
        warnings.simplefilter("ignore", FutureWarning)
        options: dict[str, Any] = {"init_sync": False, **ddp_options(train)}
        shared = nn.parallel.DistributedDataParallel(model, **options)
    # torch refuses a hook whose annotations are text, so this one has none.
    shared.register_comm_hook(None, lambda state, bucket: _all_reduce(bucket))
    shared.reducer = _FirstBuckets(shared.reducer)  # type: ignore[assignment]
    return shared


class _FirstBuckets:
    """DDP's reducer with the buckets that it begins with.

    After the first step DDP puts gradients into buckets in the order in which they came. Processes
    agree on the order by a broadcast, whose values are read. The bytes of all buckets stay.
    """

    def __init__(self, reducer: Any) -> None:
        self._reducer = reducer

    def _rebuild_buckets(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reducer, name)


def _all_reduce(bucket: Any) -> torch.futures.Future[Tensor]:
    """All-reduce a bucket as DDP's own hook does, which cannot read a fake result."""
    torch.distributed.all_reduce(bucket.buffer())
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def without_sync(shared: nn.Module) -> AbstractContextManager[None]:
    """Return a context for the micro-batches of a step before its last: gradients stay here."""
    if isinstance(shared, nn.parallel.DistributedDataParallel):
        return shared.no_sync()
    return _accumulating(shared)


@contextmanager
def _accumulating(sharded: Any) -> Iterator[None]:
    sharded.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        sharded.set_requires_gradient_sync(True)


def shard_bytes(model: nn.Module, processes: int) -> int:
    """Return the bytes of a whole model's weights that one of ``processes`` holds under FSDP2.

    Parameters are split along their first dimension, padded to equal parts. Buffers are whole.
    """
    parts = (
        math.ceil(p.shape[0] / processes) * math.prod(p.shape[1:]) * p.element_size()
        for p in model.parameters()
    )
    return sum(parts) + sum(b.numel() * b.element_size() for b in model.buffers())
