"""Choose the examples of calibration: those whose features represent the others.

The source of the idea chooses which few items to ask a new user about (Fonarev et al. 2016, arXiv
1610.04850); here it chooses at which few texts to look. The features of a text are the mean of the
body's last hidden states over its tokens, or the hidden state of the one token that a classifier
reads. The body is frozen, so the choice is made once, before calibration.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad_cli.calibration.gradients import as_in_training
from sparsegrad_cli.errors import NonFiniteError
from sparsegrad_cli.models.module_trace import evaluating
from sparsegrad_cli.numerics.maxvol import rect_maxvol
from sparsegrad_cli.recipe.schema import TrainSection

CANDIDATES = 8
"""Examples among which one is chosen."""
_NEGLIGIBLE = 1e-6


def body_features(
    model: nn.Module, batches: Iterable[dict[str, Tensor]], train: TrainSection | None = None
) -> Tensor:
    """Return the features of all examples, (examples, hidden) float64 on the CPU.

    Args:
        model: A model of transformers with a body and a head.
        batches: Batches on the model's device.
        train: Settings of autocast; None for none.

    Raises:
        NonFiniteError: A feature is NaN or infinite.
    """
    body: Any = getattr(model, str(model.base_model_prefix))
    found: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        found.append(output.last_hidden_state)

    means: list[Tensor] = []
    hook = body.register_forward_hook(keep)
    try:
        with as_in_training(model, train), evaluating(model), torch.no_grad():
            for batch in batches:
                model(**batch)
                hidden_BLI = found.pop().double()
                found.clear()
                mask_BL = batch.get("attention_mask")
                # Where a head reads the first token alone, an unpadded body returns only that.
                if mask_BL is None or mask_BL.shape != hidden_BLI.shape[:2]:
                    mask_BL = hidden_BLI.new_ones(hidden_BLI.shape[:2])
                weight_BL1 = (mask_BL > 0).double().unsqueeze(-1)
                means.append(((hidden_BLI * weight_BL1).sum(1) / weight_BL1.sum(1)).cpu())
    finally:
        hook.remove()
    features_MI = torch.cat(means)
    if not bool(torch.isfinite(features_MI).all()):
        raise NonFiniteError(
            "the hidden states of calibration examples are not finite: none can be chosen",
            where="calibration.select",
            fix="use model.dtype: float32, or calibration.select: random",
        )
    return features_MI


def representative(features_MI: Tensor, count: int) -> list[int]:
    """Return the numbers of ``count`` examples, ascending.

    They are chosen by Rectangular Maxvol on the first K left singular vectors of the features. K is
    half of ``count``, and at most the rank of the features.

    Args:
        features_MI: (examples, hidden); at least ``count`` examples.
    """
    left_MK, singular_K, _ = torch.linalg.svd(features_MI, full_matrices=False)
    live = int((singular_K > _NEGLIGIBLE * singular_K[0]).sum())
    rank = max(1, min(live, count // 2))
    return sorted(rect_maxvol(left_MK[:, :rank], count).tolist())
