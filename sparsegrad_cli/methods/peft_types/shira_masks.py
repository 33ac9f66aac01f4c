"""The masks of SHiRA beside the random one, which PEFT brings (Bhardwaj et al. 2024, section 3.1).

arXiv 2406.13175. A mask chooses the weights of a layer that train. Their number is that of LoRA's
parameters at rank r:

- ``struct``: the diagonal, which has full rank, and whole rows at equal distances;
- ``wm``: the largest magnitudes of the weight;
- ``grad``: the largest magnitudes of the gradient on ``calibration.steps`` batches;
- ``snip``: the largest magnitudes of weight times gradient (SNIP).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad_cli.methods.batch_gradients import summed_gradients
from sparsegrad_cli.methods.implementation import TrainingData
from sparsegrad_cli.models.targets import Target
from sparsegrad_cli.numerics.supports import largest_entries

Mask = Callable[..., Tensor]


def mask_function(
    kind: str, model: nn.Module, targets: list[Target], training: TrainingData | None
) -> Mask:
    """Return the function by which PEFT chooses the weights that train.

    Args:
        kind: ``struct``, ``wm``, ``grad`` or ``snip``.
        model: the plain model; ``grad`` and ``snip`` run it on the batches.
        targets: the target modules.
        training: the run that follows. Without it, ``grad`` and ``snip`` make another mask of the
            same size, and the adapter's takes its place.

    Returns:
        A function of a layer and r that returns a mask (out, in) of zeros and ones.

    Raises:
        NonFiniteError: a loss is NaN or infinite.
    """
    gradients: Mapping[str, Tensor] = {}
    if kind in ("grad", "snip"):
        if training is None:
            kind = "struct"
        else:
            gradients = summed_gradients(model, targets, training)
    names = {id(model.get_submodule(target.name)): target.name for target in targets}

    def mask(layer: Any, r: int, **_: Any) -> Tensor:
        weight_OI = layer.weight.detach()
        count = r * sum(weight_OI.shape)
        if count > weight_OI.numel():
            # PEFT refuses this size after it has asked for the mask.
            return torch.ones_like(weight_OI)
        if kind == "struct":
            return struct_mask(weight_OI, count)
        if kind == "wm":
            score_OI = weight_OI.abs()
        else:
            gradient_OI = gradients[names[id(layer)]]
            score_OI = (gradient_OI if kind == "grad" else gradient_OI * weight_OI).abs()
        chosen = largest_entries(score_OI, count).to(torch.int64)
        flat = torch.zeros(weight_OI.numel(), dtype=weight_OI.dtype, device=weight_OI.device)
        return flat.index_fill(0, chosen.to(flat.device), 1).view_as(weight_OI)

    return mask


def struct_mask(weight_OI: Tensor, count: int) -> Tensor:
    """Return a mask of the diagonal and of rows at equal distances; the last row may be a part.

    Args:
        weight_OI: (out, in), for shape, dtype and device.
        count: number of ones, at least the length of the diagonal and at most all.
    """
    rows, columns = weight_OI.shape
    mask_OI = torch.zeros_like(weight_OI)
    mask_OI.fill_diagonal_(1)
    wanted = max(1, count // columns)
    spread = [row * rows // wanted for row in range(wanted)]
    for row in [*spread, *(row for row in range(rows) if row not in spread)]:
        missing = count - int(mask_OI.sum())
        free = torch.nonzero(mask_OI[row] == 0).squeeze(1)[:missing]
        mask_OI[row, free] = 1
    return mask_OI
