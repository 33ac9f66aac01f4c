"""LoLDU: entries of the diagonal in W = P L D U train.

Shi et al. 2024, "LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for
Parameter-Efficient Fine-Tuning", arXiv 2410.13618: P a permutation, L (out, k) and U (k, in) with
ones on their diagonals, k the narrow side. The first r entries of D train; the columns of L and
rows of U stay. The parameters are the differences d to the entries of W's own D:
W + s (P L)_r diag(d) U_r. s is the paper's sigma; it does not train, as in the authors' code.

P depends on comparisons that rounding may turn around. The decomposition is made in float64 on the
CPU, the adapter holds P, and where W gives another one the adapter is refused.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparsegrad_cli.methods.neighbours.change import (
    ChangedLinear,
    ChangeMethod,
    DiagonalChange,
    Place,
)
from sparsegrad_cli.methods.neighbours.change_settings import LolduSettings


class LolduChange(DiagonalChange):
    """D = s (P L)_r diag(d) U_r.

    Attributes:
        rows: (out,) int32: row i of L is row ``rows[i]`` of W.
    """

    kept_buffers = ("rows",)
    rows: Tensor


class Loldu(ChangeMethod):
    """See :class:`sparsegrad_cli.methods.implementation.Method`."""

    settings: LolduSettings

    def make_change(self, place: Place) -> LolduChange:
        """Return a diagonal of zeros between the factors of W."""
        rank, dtype, device = place.narrow_rank, place.product_dtype, place.like.device
        p_OO, l_OK, u_KI = torch.linalg.lu(place.read_weight().double().cpu())
        u_RI, d_R = u_KI[:rank], u_KI.diagonal()[:rank]
        # Where D is zero, so is the row of U: the layer has no such direction.
        unit_RI = torch.where(d_R[:, None] == 0, 0.0, u_RI / d_R[:, None])
        left_OR = self.settings.scale * (p_OO @ l_OK[:, :rank])  # (out, out) @ (out, r)
        q_out_OR, q_in_IR = left_OR.to(device, dtype), unit_RI.T.to(device, dtype).contiguous()
        change = LolduChange(q_out_OR, q_in_IR, place.like)
        change.register_buffer("rows", p_OO.argmax(0).to(device, torch.int32))
        return change

    def load_adapter(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Load by name, after checking that W was decomposed as in training."""
        for name, layer in model.named_modules():
            if isinstance(layer, ChangedLinear) and isinstance(layer.change, LolduChange):
                rows = tensors[f"{name}.change.rows"]
                if not torch.equal(rows.cpu(), layer.change.rows.cpu()):
                    raise ValueError(f"{name}: P L D U has another P here than in training")
        super().load_adapter(model, tensors)
