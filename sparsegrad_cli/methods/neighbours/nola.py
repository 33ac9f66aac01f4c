"""NOLA: LoRA whose factors are trained combinations of frozen random matrices.

Koohpayegani et al. 2024, "NOLA: Compressing LoRA using Linear Combination of Random Basis", arXiv
2310.02556: A = sum_i a_i A_i and B = sum_j b_j B_j. The matrices follow from a key and are drawn
again in each pass, so they take no memory
(:func:`sparsegrad_cli.numerics.random_matrices.combination`). As in the authors' code, they are
uniform in [-1, 1) / sqrt(number of matrices). Here b starts at zero, and a so that A has the
variance of LoRA's; the adapter holds a, b and the key.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsegrad_cli.methods.neighbours.change import ChangeMethod, LowRankChange, Place
from sparsegrad_cli.methods.neighbours.change_settings import NolaSettings
from sparsegrad_cli.numerics.random_matrices import combination


class NolaChange(LowRankChange):
    """D = s B A, of which the coefficients a (k,) and b (k,) train.

    Args:
        place: where it goes; its size is k.
        rank: columns of B.
        scaling: s.
        key: what the random matrices follow from.
    """

    kept_buffers = ("key",)
    key: Tensor

    def __init__(self, place: Place, rank: int, scaling: float, key: int) -> None:
        super().__init__()
        self.shape, self.rank, self.scaling = (place.out_features, place.in_features), rank, scaling
        self.a = nn.Parameter(place.like.new_empty(place.size))
        self.b = nn.Parameter(place.like.new_zeros(place.size))
        nn.init.normal_(self.a, std=place.in_features**-0.5)
        made = torch.tensor(key, dtype=torch.int64, device=place.like.device)
        self.register_buffer("key", made)

    def product(self) -> tuple[Tensor, Tensor]:
        """Return s B and A."""
        out, inn = self.shape
        # The complement of a key is the key of no other target: those are not negative.
        b_OR = combination(self.b, self.key, out, self.rank)
        a_RI = combination(self.a, ~self.key, self.rank, inn)
        return b_OR * self.scaling, a_RI


class Nola(ChangeMethod):
    """See :class:`sparsegrad_cli.methods.implementation.Method`."""

    settings: NolaSettings

    def make_change(self, place: Place) -> NolaChange:
        """Return a change whose b is zero; its key follows from the seed and the target."""
        rank = self.settings.rank
        alpha = self.settings.alpha or 2 * rank
        # The seed that the caller set: a number, also where tensors have no values.
        key = (torch.initial_seed() % 2**32 << 16) + place.number
        return NolaChange(place, rank, alpha / rank, key)
