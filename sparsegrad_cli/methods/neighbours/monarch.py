"""MoRe: W plus a Monarch matrix, two block-diagonal factors with permutations between them.

Tan et al. 2024, "MoRe Fine-Tuning with 10x Fewer Parameters", arXiv 2408.17383; Monarch matrices
are those of Dao et al. 2022, arXiv 2204.00595: M = P_1 L P_2 R. R has N blocks (r, in / N), L has N
blocks (out / N, r). P_2 deals the N r numbers between them out to the blocks of L in turn, and P_1
the outputs of the blocks of L to the outputs of the layer. M has the parameters of LoRA of rank r,
and a rank of up to N r. Where N does not divide a side, the side is padded.

As in the authors' code, L starts at zero and R uniform by the columns of a block. Their search over
architectures (N and r) is left out: the recipe says both. Products are made with the factors as
matrices with zeros, so a step costs what LoRA of rank N r costs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsegrad_cli.methods.neighbours.change import ChangeMethod, LowRankChange, Place
from sparsegrad_cli.methods.neighbours.change_settings import MonarchSettings


class MonarchChange(LowRankChange):
    """D = P_1 L P_2 R with L (N, out / N, r), which starts at zero, and R (N, r, in / N)."""

    def __init__(self, place: Place, blocks: int) -> None:
        super().__init__()
        self.shape = (place.out_features, place.in_features)
        rows, columns = (-(-side // blocks) for side in self.shape)
        self.l = nn.Parameter(place.like.new_zeros(blocks, rows, place.rank))
        self.r = nn.Parameter(place.like.new_empty(blocks, place.rank, columns))
        nn.init.uniform_(self.r, -(columns**-0.5), columns**-0.5)

    def product(self) -> tuple[Tensor, Tensor]:
        """Return P_1 L P_2 and R."""
        out, inn = self.shape
        blocks, rows, rank = self.l.shape
        middle = torch.arange(blocks * rank, device=self.l.device)
        # Block i of L reads numbers i, i + N, i + 2 N ... of the N r.
        p_1 = torch.arange(blocks * rows, device=self.l.device).view(blocks, rows).T.reshape(-1)
        p_2 = (middle % blocks) * rank + middle // blocks
        left = torch.block_diag(*self.l)[p_1[:out]][:, p_2]  # (out, N r)
        return left, torch.block_diag(*self.r)[:, :inn]  # (N r, in)


class Monarch(ChangeMethod):
    """See :class:`sparsegrad_cli.methods.implementation.Method`."""

    settings: MonarchSettings

    def make_change(self, place: Place) -> MonarchChange:
        """Return a Monarch matrix of zeros."""
        return MonarchChange(place, self.settings.blocks)
