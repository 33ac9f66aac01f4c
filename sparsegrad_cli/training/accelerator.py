"""The Accelerator of a run: device, mixed precision, and how processes share the work.

Uses private attributes of accelerate, checked with accelerate 1.15.0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState, GradientState
from accelerate.tracking import GeneralTracker
from accelerate.utils import GradientAccumulationPlugin, TorchDynamoPlugin
from torch import nn

from sparsegrad_cli.models.targets import Target
from sparsegrad_cli.recipe.schema import TrainSection
from sparsegrad_cli.run import launcher
from sparsegrad_cli.run.launcher import DEEPSPEED, FSDP
from sparsegrad_cli.tasks.setup import Setup


def make_accelerator(
    train: TrainSection,
    setup: Setup,
    trackers: Sequence[GeneralTracker],
    note: Callable[[str], None],
) -> Accelerator:
    """Make the Accelerator of one run.

    Args:
        train: The recipe's section.
        setup: Model, targets and device of the run.
        trackers: Experiment trackers to log to.
        note: Called if weights stay whole although a launcher asked for sharding.
    """
    _reset_accelerate()
    accelerator = Accelerator(
        cpu=setup.device.type == "cpu",
        mixed_precision="bf16" if train.bf16 else "fp16" if train.fp16 else "no",
        # The loop accumulates by itself, since accelerate divides by micro-batches, not by items.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        dynamo_plugin=TorchDynamoPlugin(backend="inductor") if train.torch_compile else None,
        log_with=list(trackers) or None,
        kwargs_handlers=[DistributedDataParallelKwargs(**ddp_options(train))],
    )
    how = sharded_by(accelerator)
    if how == FSDP:
        configure_fsdp(accelerator.state.fsdp_plugin, setup.model, setup.targets)
    elif how == DEEPSPEED:
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config["gradient_accumulation_steps"] = train.gradient_accumulation_steps
        config["gradient_clipping"] = train.max_grad_norm
    elif (requested := launcher.requested_sharding()) is not None:
        note(f"accelerate shards weights on GPUs only: DDP is used instead of {requested}")
    return accelerator


def _reset_accelerate() -> None:
    """Let the next Accelerator choose its own device and precision.

    accelerate keeps both for the whole process, and refuses a second Accelerator that differs. One
    process may train several runs: the commands of a Python program, or of a test.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def sharded_by(accelerator: Accelerator) -> str | None:
    """Return ``FSDP`` or ``DEEPSPEED``; None where every process holds all weights."""
    if getattr(accelerator.state, "deepspeed_plugin", None) is not None:
        return DEEPSPEED
    return FSDP if accelerator.is_fsdp2 else None


def ddp_options(train: TrainSection) -> dict[str, bool]:
    """Return the options of DistributedDataParallel."""
    return {
        # Recomputed blocks must not be searched for unused parameters.
        "find_unused_parameters": not train.gradient_checkpointing,
        # No buffer changes in training; bases are buffers, and would be sent every step.
        "broadcast_buffers": False,
    }


def configure_fsdp(plugin: Any, model: nn.Module, targets: Sequence[Target]) -> None:
    """Choose FSDP2's units and turn off its own mixed precision.

    - The units are the blocks that hold target modules. By default accelerate 1.15 takes
      transformers' ``_no_split_modules``, which for BERT contain the embeddings; it then shards
      these twice, and fails.
    - FSDP2's mixed precision would gather float32 values in half precision and sum their gradients
      in it. Autocast around the forward pass computes what a single process computes.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    plugin.mixed_precision_policy = MixedPrecisionPolicy()
    by_class = plugin.auto_wrap_policy is transformer_auto_wrap_policy
    if by_class and plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = block_classes(model, targets)


def block_classes(model: nn.Module, targets: Sequence[Target]) -> list[str]:
    """Return the class names of the blocks that hold target modules, each once."""
    blocks = (model.get_submodule(t.name.removesuffix(f".{t.kind}")) for t in targets)
    return sorted({type(block).__name__ for block in blocks})


def gradient_bytes(model: nn.Module, accelerator: Accelerator) -> int | None:
    """Return the bytes of gradients that each process sends in a step; None where DDP is not used.

    DDP sums the gradient of every parameter that trains.
    """
    if not accelerator.use_distributed or sharded_by(accelerator) is not None:
        return None
    trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
    return sum(math.prod(p.shape) * p.element_size() for p in trained)
