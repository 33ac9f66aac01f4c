"""SoRA: W + s B diag(g) A, whose gate g is driven to zero rank by rank.

Ding et al. 2023, "Sparse Low-rank Adaptation of Pre-trained Language Models", arXiv 2311.11696:
the loss gets an L1 penalty on the gate, which a proximal step minimizes. After each
gradient step, g <- T(g) with the soft threshold T(x) = sign(x) max(|x| - t, 0). A rank whose gate
is zero adds nothing, and leaves the exported adapter.

The gradient step on the gate is AdamW's, as in the authors' experiments, and t is a constant. The
gate does not decay: the threshold is its regularization.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sparsegrad_cli.methods.implementation import Factors
from sparsegrad_cli.methods.neighbours.adaptive_settings import SoraSettings
from sparsegrad_cli.methods.neighbours.change import ChangeMethod, LowRankChange, Place
from sparsegrad_cli.methods.optimizer import make_optimizer
from sparsegrad_cli.models.targets import Target
from sparsegrad_cli.recipe.schema import TrainSection


class SoraChange(LowRankChange):
    """D = s B diag(g) A with B (out, r), g (r,), A (r, in). B starts at zero, g at random."""

    def __init__(self, place: Place, scale: float) -> None:
        super().__init__()
        like, rank = place.like, place.rank
        self.b = nn.Parameter(like.new_zeros(place.out_features, rank))
        self.gate = nn.Parameter(torch.randn_like(like.new_empty(rank)))
        self.a = nn.Parameter(like.new_empty(rank, place.in_features))
        self.scale = scale
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def product(self) -> tuple[Tensor, Tensor]:
        """Return s B diag(g) and A."""
        return self.b * (self.scale * self.gate), self.a


class Sora(ChangeMethod):
    """See :class:`sparsegrad_cli.methods.implementation.Method`."""

    settings: SoraSettings

    def make_change(self, place: Place) -> SoraChange:
        """Return a change whose B is zero."""
        return SoraChange(place, (self.settings.alpha or 2 * place.rank) / place.rank)

    def optimizer(self, model: nn.Module, train: TrainSection) -> torch.optim.Optimizer:
        """Return the optimizer, with the soft threshold on every gate after each step."""
        gates = [module.gate for module in model.modules() if isinstance(module, SoraChange)]
        optimizer = make_optimizer(model, train, undecayed=set(gates))
        threshold = self.settings.threshold

        @torch.no_grad()
        def shrink(*_: object) -> None:
            for gate in gates:
                soft_threshold_(gate, threshold)

        optimizer.register_step_post_hook(shrink)
        return optimizer

    def factors(self, model: nn.Module, target: Target) -> Factors | None:
        """Return B and A of the ranks whose gate is not zero, and at least of one."""
        found = super().factors(model, target)
        return found and without_zero_ranks(found)


def without_zero_ranks(factors: Factors) -> Factors:
    """Return folded factors without the columns of B that are zero; at least one is left."""
    kept = torch.nonzero(factors.b.abs().sum(0)).squeeze(1)
    kept = kept if len(kept) else kept.new_zeros(1)
    return Factors(factors.b[:, kept], factors.a[kept], len(kept))


def soft_threshold_(values: Tensor, threshold: float) -> Tensor:
    """Set values to sign(v) max(|v| - threshold, 0), in place, and return them."""
    return values.copy_(values.sign() * (values.abs() - threshold).clamp_(min=0))
