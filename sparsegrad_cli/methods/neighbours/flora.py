"""FLoRA: W + s B G A, a product of two factors and a core that all train.

Si et al. 2024, "FLoRA: Low-Rank Core Space for N-dimension", arXiv 2405.14739: the change of a
weight of N dimensions in Tucker form, G x_1 U_1 ... x_N U_N. Here N is 2, a linear layer. G starts
at zero and s is a constant, as in the authors' code.
"""

from __future__ import annotations

from torch import Tensor, nn

from sparsegrad_cli.methods.neighbours.change import ChangeMethod, LowRankChange, Place
from sparsegrad_cli.methods.neighbours.change_settings import FloraSettings


class FloraChange(LowRankChange):
    """D = s B G A with B (out, r), G (r, r), A (r, in). G starts at zero."""

    def __init__(self, place: Place, scale: float) -> None:
        super().__init__()
        like, rank = place.like, place.rank
        self.b = nn.Parameter(like.new_empty(place.out_features, rank))
        self.g = nn.Parameter(like.new_zeros(rank, rank))
        self.a = nn.Parameter(like.new_empty(rank, place.in_features))
        self.scale = scale
        for factor in (self.b, self.a):  # the authors' variance
            nn.init.normal_(factor, std=(2 * rank) ** -0.5)

    def product(self) -> tuple[Tensor, Tensor]:
        """Return s B G and A."""
        return (self.b @ self.g) * self.scale, self.a  # (out, r) @ (r, r)


class Flora(ChangeMethod):
    """See :class:`sparsegrad_cli.methods.implementation.Method`."""

    settings: FloraSettings

    def make_change(self, place: Place) -> FloraChange:
        """Return a change whose core is zero."""
        return FloraChange(place, self.settings.scale)
