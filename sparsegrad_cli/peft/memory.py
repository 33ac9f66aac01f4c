"""Save memory in the training of a PEFT model, in one call."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.models import memory_savers
from sparsegrad_cli.models.precision import HALF
from sparsegrad_cli.models.quantized import record_dtype, use_frozen_forward
from sparsegrad_cli.models.targets import Target, find_blocks, find_targets
from sparsegrad_cli.peft.layer import SparseGradLayer
from sparsegrad_cli.recipe.schema import TargetsSection


def save_memory(
    model: nn.Module,
    *,
    recompute: Literal["none", "activation"] = "none",
    autocast: torch.dtype | None = None,
) -> dict[str, int]:
    """Reduce the memory that the activations of a PEFT model take until the backward pass.

    Outputs and gradients stay bit for bit the same, also those of adapters of other types. The one
    exception is an 8-bit model in evaluation on the CPU, which then computes as in training: by
    itself, bitsandbytes rounds the inputs to int8 there. Calling it a second time changes nothing.

    - Dropout saves one byte per value of its mask.
    - A gated MLP, as in LLaMA, saves two wide tensors instead of three.
    - An 8-bit or 4-bit layer saves nothing.

    Args:
        model: The result of ``peft.get_peft_model``, or a model of transformers with adapters;
            changed in place.
        recompute: ``activation`` computes the wide activation of every MLP again in the backward
            pass, which costs one more product per MLP.
        autocast: The dtype of autocast in training, such as with ``bf16=True`` of
            TrainingArguments: the bases of SparseGrad adapters are kept in it, and not cast in
            every pass. Products under autocast stay the same; without it, and in a merged weight,
            the bases are now rounded.

    Returns:
        What was changed: numbers of ``dropouts``, ``gated_mlps``, ``quantized_layers``,
        ``recomputed_mlps`` and ``bases``.

    Raises:
        ValueError: ``recompute`` or ``autocast`` is unknown, or the MLPs are not modules of their
            own.
    """
    if autocast not in (None, *HALF):
        raise ValueError(f"autocast is {autocast!r}: expected torch.bfloat16 or torch.float16")
    if recompute not in ("none", "activation"):
        raise ValueError(f"recompute is {recompute!r}: expected 'none' or 'activation'")
    inside = getattr(model, "get_base_model", lambda: model)()
    targets = _mlp_layers(inside)
    record_dtype(inside)
    changed = {
        "dropouts": memory_savers.use_byte_dropout(inside),
        "gated_mlps": memory_savers.use_efficient_gated_mlps(inside, targets),
        "quantized_layers": use_frozen_forward(inside, None),
        "recomputed_mlps": 0,
        "bases": 0 if autocast is None else _narrow_bases(inside, autocast),
    }
    if recompute == "activation":
        changed["recomputed_mlps"] = _recompute(inside, targets)
    return changed


def _mlp_layers(model: nn.Module) -> list[Target]:
    """Return the linear layers of MLPs; none if the model has no blocks or no MLP is recognized."""
    if not find_blocks(model):
        return []
    try:
        return find_targets(model, TargetsSection(), "recompute")
    except UsageError:
        return []


def _narrow_bases(model: nn.Module, dtype: torch.dtype) -> int:
    """Convert the bases of SparseGrad adapters; layers that share one go on sharing it.

    Returns:
        The number of bases that had another dtype.
    """
    narrow: dict[int, tuple[Tensor, Tensor]] = {}  # The old tensors stay alive, so ids are unique.
    for layer in model.modules():
        if not isinstance(layer, SparseGradLayer):
            continue
        for held in (layer.sparsegrad_q_out, layer.sparsegrad_q_in):
            for name, wide in held.named_buffers():
                if wide.dtype != dtype:
                    _, held[name] = narrow.setdefault(id(wide), (wide, wide.to(dtype)))
    return len(narrow)


def _recompute(model: nn.Module, targets: list[Target]) -> int:
    try:
        return len(memory_savers.recompute_activations(model, targets))
    except UsageError as error:
        raise ValueError(
            f"recompute='activation': {error.what}. Call model.gradient_checkpointing_enable() "
            "instead, which computes whole blocks again"
        ) from error
