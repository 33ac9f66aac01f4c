"""GaLore: Adam in the leading singular directions of the gradient.

Zhao et al. 2024, arXiv 2403.03507. For W (m, n) with m <= n, every T steps
P = U[:, :r] of the SVD of the gradient G; R = P' G; Adam's direction N of R; W <- W - lr alpha P N.
For m > n the other side is projected. Moments are kept when P changes, as in the paper.

Left out: the general form that projects both sides (by P and Q), Adafactor and 8-bit
Adam as the inner optimizer, and updates layer by layer during the backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsegrad_cli.methods.neighbours.gradient_settings import SubspaceSettings
from sparsegrad_cli.methods.neighbours.projected import (
    ProjectedMethod,
    State,
    SubspaceView,
    View,
)
from sparsegrad_cli.models.targets import Target


def leading_directions(grad_SL: Tensor, rank: int) -> Tensor:
    """Return the ``rank`` leading left singular vectors of a matrix (short, long): (short, rank).

    A gradient with NaN or Inf, which no decomposition accepts, gives NaN: the training loop then
    reports the loss of the next step.
    """
    rank = min(rank, grad_SL.shape[0])
    if not bool(torch.isfinite(grad_SL).all()):
        return torch.full_like(grad_SL[:, :rank], float("nan"))
    left_SS: Tensor = torch.linalg.svd(grad_SL, full_matrices=False).U
    return left_SS[:, :rank].clone(memory_format=torch.contiguous_format)


class GaloreView(SubspaceView):
    """The state holds P (short, r) under ``projection``."""

    def choose(self, grad_SL: Tensor, state: State) -> None:
        """Take the leading singular vectors of this gradient."""
        state["projection"] = leading_directions(grad_SL, self.rank)

    def basis(self, grad_SL: Tensor, state: State) -> Tensor:
        """Return the projection that is held."""
        return state["projection"]


class Galore(ProjectedMethod):
    """See :class:`sparsegrad_cli.methods.implementation.Method`."""

    settings: SubspaceSettings

    def view(self, target: Target, number: int) -> View:
        """Return GaLore's view."""
        chosen = self.settings
        return GaloreView(chosen.rank, chosen.update_every, chosen.scale)
