"""SNELL: a sparse change of high rank, made of two low-rank matrices by a non-linear kernel.

Shen et al. 2024, "Expanding Sparse Tuning for Low Memory Usage", arXiv 2411.01800:

    K_ij = kappa(B_i, A_j)                    equation 4, rows of B (out, r) and of A (in, r)
    D_ij = K_ij max(|K_ij| - t, 0)            equation 5, t = the ceil(s out in)-th smallest |K|

with the piecewise linear kernel of appendix B and table A6, P = 2: the rows are cut into two
pieces, and kappa(x, y) = a_1 |x_1 - y_1| + a_2 |x_2 - y_2| with trained a_1 and a_2. The entries of
K compete: s is the share that is zero in D. D is built again in the backward pass, as in the paper;
t is a constant in its derivative.

A kernel of distances is not zero at the start, and where it is, equation 5 has no gradient: the
layer therefore starts a little off the plain one, as the authors' does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsegrad_cli.methods.neighbours.adaptive_settings import SnellSettings
from sparsegrad_cli.methods.neighbours.change import Change, ChangeMethod, FrozenLayer, Place
from sparsegrad_cli.numerics.matrix_change import matrix_change_linear

PIECES = 2
_START = 0.1  # |a_1| and |a_2| at the start, of opposite signs, as the authors set them


class SnellChange(Change):
    """The sparse kernel matrix of B (out, r) and A (in, r), with one factor per piece.

    Args:
        place: where the change goes.
        sparsity: s, the share of D that is zero.
    """

    def __init__(self, place: Place, sparsity: float) -> None:
        super().__init__()
        like, rank = place.like, place.rank
        self.b = nn.Parameter(like.new_empty(place.out_features, rank))
        self.a = nn.Parameter(like.new_empty(place.in_features, rank))
        signs = [_START * (-1) ** piece for piece in range(PIECES)]
        self.alpha = nn.Parameter(like.new_tensor(signs))
        self.zeros = math.ceil(sparsity * place.target.size)
        self._read_weight = place.read_weight
        for rows in (self.b, self.a):  # as the authors' kaiming_uniform_ of (pieces, side, r / 2)
            bound = 1 / math.sqrt(rows.shape[0] * max(1, rank // PIECES))
            nn.init.uniform_(rows, -bound, bound)

    def delta_OI(self) -> Tensor:
        """Return D."""
        return self._build(self.b, self.a, self.alpha)

    def _build(self, b_OR: Tensor, a_IR: Tensor, alpha_P: Tensor) -> Tensor:
        return competed(piecewise_kernel(b_OR, a_IR, alpha_P), self.zeros)

    def beside(self, x: Tensor, base: FrozenLayer) -> Tensor:
        """Return x (W + D)' + b, saving x, B and A."""
        return matrix_change_linear(
            x, self._read_weight, base.any_bias_O, self._build, self.b, self.a, self.alpha
        )


def piecewise_kernel(b_OR: Tensor, a_IR: Tensor, alpha_P: Tensor) -> Tensor:
    """Return (out, in): sum over pieces p of alpha_p |b_ip - a_jp|.

    Args:
        b_OR, a_IR: (out, r) and (in, r), cut into ``len(alpha_P)`` pieces of columns.
        alpha_P: (pieces,).
    """
    rank, pieces = b_OR.shape[1], len(alpha_P)
    ends = [math.ceil(rank * p / pieces) for p in range(pieces + 1)]
    kernel_OI = b_OR.new_zeros(len(b_OR), len(a_IR))
    for piece in range(pieces):
        here = slice(ends[piece], ends[piece + 1])
        kernel_OI = kernel_OI + alpha_P[piece] * distances(b_OR[:, here], a_IR[:, here])
    return kernel_OI


def distances(b_OR: Tensor, a_IR: Tensor) -> Tensor:
    """Return the Euclidean distances between rows, (out, in); the gradient is zero at zero."""
    return torch.cdist(b_OR, a_IR, compute_mode="donot_use_mm_for_euclid_dist")


def competed(kernel_OI: Tensor, zeros: int) -> Tensor:
    """Return K max(|K| - t, 0), where t is the ``zeros``-th smallest |K|, or 0."""
    sizes_OI = kernel_OI.detach().abs()
    threshold = sizes_OI.new_zeros(())
    if zeros:
        threshold = sizes_OI.flatten().kthvalue(zeros).values
    return kernel_OI * F.relu(kernel_OI.abs() - threshold)


class Snell(ChangeMethod):
    """See :class:`sparsegrad_cli.methods.implementation.Method`."""

    settings: SnellSettings

    def make_change(self, place: Place) -> SnellChange:
        """Return a change whose rows are random."""
        return SnellChange(place, self.settings.sparsity)
