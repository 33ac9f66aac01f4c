"""How accelerate's FSDP2 is to split a model that a method has prepared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from sparsegrad_cli.models.targets import Target
from sparsegrad_cli.run import launcher


def settle(
    trainer: Any, model: nn.Module, targets: Sequence[Target], note: Callable[[str], None]
) -> None:
    """What accelerate has to be told before it splits a model; nothing where it does not.

    - Units are the blocks that hold the targets. Left alone, accelerate 1.15 takes what
      transformers will not part (``_no_split_modules``); for BERT that has the embeddings in it,
      which it then splits a second time, and fails.
    - No mixed precision of FSDP2's: it would gather float32 values in half precision and sum their
      gradients so. Autocast around the forward pass computes what one process does.

    Args:
        note: told where weights stay whole although a launcher asked for them to be split.
    """
    if trainer.split_by is None:
        asked = launcher.asked()
        if asked is not None:
            note(f"accelerate splits weights on accelerators alone: no {asked} here, but DDP")
        return
    if trainer.split_by != launcher.FSDP:
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    plugin = trainer.accelerator.state.fsdp_plugin
    plugin.mixed_precision_policy = MixedPrecisionPolicy()
    by_class = plugin.auto_wrap_policy is transformer_auto_wrap_policy
    if by_class and plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = block_classes(model, targets)


def block_classes(model: nn.Module, targets: Sequence[Target]) -> list[str]:
    """Names of the classes of the blocks that targets lie in, each once."""
    blocks = (model.get_submodule(t.name.removesuffix(f".{t.kind}")) for t in targets)
    return sorted({type(block).__name__ for block in blocks})
