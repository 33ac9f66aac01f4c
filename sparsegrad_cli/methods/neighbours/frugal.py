"""FRUGAL: Adam on some columns of the gradient, sign descent on the others.

Zmushko et al. 2024, arXiv 2411.07837, with the column-wise projection, Adam as the
state-full and signSGD as the state-free rule. Every T steps a share rho of W's columns is drawn
again, and Adam's moments and bias corrections start again. The drawn columns take Adam's step with
rate lr, all others W <- W - lr c sign(G); the paper has c = 0.1 for fine-tuning.

Draws follow from the run's seed, the target's number and the number of the draw, not from the
global generator: a resumed run draws the same, and dropout stays as it is without FRUGAL.

Left out: the block-wise, random-entry and SVD projections, and SGD as the state-free rule.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from sparsegrad_cli.methods.implementation import Adapted
from sparsegrad_cli.methods.neighbours.gradient_settings import FrugalSettings
from sparsegrad_cli.methods.neighbours.projected import (
    ProjectedMethod,
    State,
    View,
    adam_direction,
)
from sparsegrad_cli.models.targets import Target
from sparsegrad_cli.numerics.hosvd import Basis
from sparsegrad_cli.numerics.selective_adamw import AdamW

_SEEDS = 2**31


def drawn_columns(seed: int, number: int, draw: int, count: int, of: int) -> Tensor:
    """Return ``count`` different columns out of ``of``, ascending int64.

    Args:
        seed: of the run.
        number: of the target.
        draw: number of the draw, from 0.
        count, of: how many columns.
    """
    order = np.random.default_rng([seed, number, draw]).permutation(of)
    return torch.tensor(sorted(order[:count].tolist()))


class FrugalView(View):
    """The state holds the drawn columns (``columns``, int64) and Adam's moments of them.

    Args:
        count: columns of W with state.
        update_every: steps between two draws.
        free_scale: c, the factor of the learning rate of sign descent.
        seed, number: as in :func:`drawn_columns`.
    """

    def __init__(
        self, count: int, update_every: int, free_scale: float, seed: int, number: int
    ) -> None:
        super().__init__(update_every)
        self.count, self.free_scale = count, free_scale
        self.seed, self.number = seed, number

    def direction(self, grad_OI: Tensor, state: State, adamw: AdamW, step: int) -> Tensor:
        """Return Adam's direction in the drawn columns and c sign(G) in the others, (out, in)."""
        draw, since = divmod(step - 1, self.update_every)
        if since == 0:
            columns = drawn_columns(self.seed, self.number, draw, self.count, grad_OI.shape[1])
            state["columns"] = columns.to(grad_OI.device)
            state.pop("exp_avg", None)
            state.pop("exp_avg_sq", None)
        columns = state["columns"]
        step_OI = grad_OI.sign() * self.free_scale
        step_OI[:, columns] = adam_direction(grad_OI[:, columns], state, adamw, since + 1)
        return step_OI


class Frugal(ProjectedMethod):
    """See :class:`sparsegrad_cli.methods.implementation.Method`."""

    settings: FrugalSettings

    def adapt(
        self,
        model: nn.Module,
        targets: list[Target],
        bases: Mapping[str, Basis],
        scores: Mapping[str, Tensor],
    ) -> Adapted:
        """Unfreeze the targets' weights, and take a seed from the run's generator."""
        self._seed = int(torch.randint(_SEEDS, ()))
        return super().adapt(model, targets, bases, scores)

    def view(self, target: Target, number: int) -> View:
        """Return FRUGAL's view of a target."""
        chosen, count = self.settings, self.settings.columns_of(target)
        return FrugalView(count, chosen.update_every, chosen.free_scale, self._seed, number)
