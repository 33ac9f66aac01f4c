"""Block-LoRA: LoRA whose factor A is one block, repeated.

Zhou et al. 2025, "One Head Eight Arms: Block Matrix based Low Rank Adaptation for CLIP-based
Few-Shot Learning", arXiv 2501.16720. LoRA's factors in n blocks, B = [B_1 ... B_n] and
A = [A_1; ...; A_n], with all A_i equal to one A_s: B A = (B_1 + ... + B_n) A_s. ``rank`` is that
of A_s, so the paper's r is n x rank. Only the abstract could be read again; that the blocks of A
lie one below the other follows from its words (the products become sums of matrices).

All B_i start at zero and have the same gradient, so AdamW keeps them equal: this is LoRA of the
rank of A_s, whose B moves n times as far in a step.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from sparsegrad_cli.methods.neighbours.change import ChangeMethod, LowRankChange, Place
from sparsegrad_cli.methods.neighbours.change_settings import BlockLoraSettings


class BlockLoraChange(LowRankChange):
    """D = s (B_1 + ... + B_n) A_s with B (n, out, r), A_s (r, in). B starts at zero."""

    def __init__(self, place: Place, blocks: int, scaling: float) -> None:
        super().__init__()
        self.b = nn.Parameter(place.like.new_zeros(blocks, place.out_features, place.rank))
        self.a = nn.Parameter(place.like.new_empty(place.rank, place.in_features))
        self.scaling = scaling
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))  # as LoRA's A

    def product(self) -> tuple[Tensor, Tensor]:
        """Return s (B_1 + ... + B_n) and A_s."""
        return self.b.sum(0) * self.scaling, self.a


class BlockLora(ChangeMethod):
    """See :class:`sparsegrad_cli.methods.implementation.Method`."""

    settings: BlockLoraSettings

    def make_change(self, place: Place) -> BlockLoraChange:
        """Return a change whose B_i are zero."""
        alpha = self.settings.alpha or 2 * place.rank
        return BlockLoraChange(place, self.settings.blocks, alpha / place.rank)
