"""Fira: GaLore, and a scaled step on what GaLore's subspace leaves out.

Chen et al. 2024, arXiv 2410.01623, Algorithm 1 (eqs. 10 to 12). With GaLore's P, R = P' G and
Adam's direction N of R, the residual S = G - P R is scaled column by column by
norm(N[:, i]) / (norm(R[:, i]) + eps) (eq. 11), and S as a whole is scaled down so that its norm
grows by at most a factor gamma per step (eq. 12). W <- W - lr alpha (P N + S).

The first step has no norm before it and is not limited: eq. 12 read literally, with a norm of 0,
would hold S at about eps for thousands of steps. Left out: the matrix-level factor of eq. 10, which
the paper replaces by eq. 11.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsegrad_cli.methods.neighbours.galore import GaloreView
from sparsegrad_cli.methods.neighbours.gradient_settings import FiraSettings
from sparsegrad_cli.methods.neighbours.projected import ProjectedMethod, State, View
from sparsegrad_cli.models.targets import Target


class FiraView(GaloreView):
    """The state holds P, and the norm of the last step outside of the subspace (``residual``).

    Args:
        rank, update_every, scale: as in :class:`GaloreView`.
        growth: gamma, the largest factor by which that norm may grow in one step.
    """

    def __init__(self, rank: int, update_every: int, scale: float, growth: float) -> None:
        super().__init__(rank, update_every, scale)
        self.growth = growth

    def beyond(
        self,
        grad_SL: Tensor,
        p_SR: Tensor,
        low_RL: Tensor,
        adam_RL: Tensor,
        state: State,
        eps: float,
    ) -> Tensor:
        """Return the scaled and limited residual, (short, long)."""
        factors_L: Tensor = adam_RL.norm(dim=0) / (low_RL.norm(dim=0) + eps)
        residual_SL = (grad_SL - p_SR @ low_RL) * factors_L  # (short, r) @ (r, long)
        norm = residual_SL.norm()
        if "residual" in state:
            grown = norm / (state["residual"] + eps)
            limit = self.growth / torch.clamp(grown, min=self.growth)
            residual_SL, norm = residual_SL * limit, norm * limit
        state["residual"] = norm
        return residual_SL


class Fira(ProjectedMethod):
    """See :class:`sparsegrad_cli.methods.implementation.Method`."""

    settings: FiraSettings

    def view(self, target: Target, number: int) -> View:
        """Return Fira's view."""
        chosen = self.settings
        return FiraView(chosen.rank, chosen.update_every, chosen.scale, chosen.growth_limit)
