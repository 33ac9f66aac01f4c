"""LoRA-SB: W + B R A, of which R trains; B, R and A approximate the first step of full training.

Ponkshe et al. 2024, "Initialization using Update Approximation is a Silver Bullet for Extremely
Efficient Low-Rank Fine-Tuning", arXiv 2411.19557: the first step of AdamW on all of W
is close to M = -lr sign(sum of gradients); with M ~ U S V' of rank r, B = U, A = V' and R = S start
as this step. As B and A are orthonormal, the gradient of R needs no correction, and the
paper's scaling s has no effect: it is left out. The gradients are those of
``calibration.steps`` batches, each of a mean over the batch, where the paper sums over examples.

B and A have orthonormal columns and rows and stay frozen; the adapter holds them.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from sparsegrad_cli.methods.batch_gradients import summed_gradients
from sparsegrad_cli.methods.implementation import Adapted
from sparsegrad_cli.methods.neighbours.change import ChangeMethod, CoreChange, Place
from sparsegrad_cli.methods.neighbours.change_settings import LoraSbSettings
from sparsegrad_cli.models.targets import Target
from sparsegrad_cli.numerics.hosvd import Basis
from sparsegrad_cli.numerics.lowrank import leading_singular_vectors


class LoraSbChange(CoreChange):
    """D = B R A: B (out, r) and A' (in, r) are the buffers, R (r, r) trains.

    Args:
        b_OR, a_IR: B and A', orthonormal.
        core_RR: R at the start, float32 or wider.
    """

    kept_buffers = ("q_out", "q_in")

    def __init__(self, b_OR: Tensor, a_IR: Tensor, core_RR: Tensor) -> None:
        super().__init__(b_OR, a_IR)
        self.r = nn.Parameter(core_RR)

    def core_RS(self) -> Tensor:
        """Return R."""
        return self.r


class LoraSb(ChangeMethod):
    """See :class:`sparsegrad_cli.methods.implementation.Method`."""

    settings: LoraSbSettings

    def __init__(self, settings: LoraSbSettings) -> None:
        super().__init__(settings)
        self._gradients: dict[str, Tensor] = {}

    def adapt(
        self,
        model: nn.Module,
        targets: list[Target],
        bases: Mapping[str, Basis],
        scores: Mapping[str, Tensor],
    ) -> Adapted:
        """Sum the gradients of the run's batches, and put a change beside every target."""
        if self.training is not None:
            self._gradients = summed_gradients(model, targets, self.training)
        return super().adapt(model, targets, bases, scores)

    def make_change(self, place: Place) -> LoraSbChange:
        """Return the approximated first step; zeros of the same shapes without a run."""
        rank, like, dtype = place.narrow_rank, place.like, place.product_dtype
        if self.training is None:
            zeros = like.new_zeros
            b_OR, a_IR = zeros(place.out_features, rank), zeros(place.in_features, rank)
            return LoraSbChange(b_OR.to(dtype), a_IR.to(dtype), zeros(rank, rank))
        step_OI = -self.settings.init_learning_rate * self._gradients.pop(place.target.name).sign()
        u_OR, s_R, v_IR = leading_singular_vectors(step_OI.to(like.dtype), rank)
        return LoraSbChange(u_OR.to(dtype), v_IR.to(dtype), s_R.diag())
