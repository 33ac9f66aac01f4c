"""DCT-AdamW: Adam on the columns of the cosine transform that fit the gradient best.

Modoranu et al. 2025, arXiv 2505.17967: dynamic column selection and DCT-AdamW. With Q the
orthogonal matrix of the discrete cosine transform of the shorter side, every T steps the r columns
with the largest norm of Q' G are chosen. They minimize the error of the projection among all
choices in the l2 norm (the paper's code ranks by l1). Adam runs on Q_r' G, and its direction is
projected back by Q_r.

Only the r indices are kept. The moments are rotated into the new columns by R = Q_old' Q_new, as
in the paper: as the columns of Q are orthonormal, R carries over the moments of the columns that
stay, and sets those of new columns to 0.

Left out: the error feedback, an option in the paper that keeps a second matrix of W's size; the
fast transform, for which a product with Q stands here; Trion, which is the same selection with an
orthogonalized momentum in place of Adam.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsegrad_cli.methods.neighbours.gradient_settings import SubspaceSettings
from sparsegrad_cli.methods.neighbours.projected import (
    ProjectedMethod,
    State,
    SubspaceView,
    View,
)
from sparsegrad_cli.models.targets import Target


def cosine_columns(size: int, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """Return columns of the orthogonal matrix of the cosine transform (DCT-II), (size, columns).

    Column k is c_k cos(pi k (2 i + 1) / (2 size)) for row i, with c_k = sqrt(2 / size), and
    sqrt(1 / size) for k = 0. Angles are reduced as whole numbers and evaluated in float64.

    Args:
        size: rows.
        columns: (r,) whole numbers from 0 to size - 1.
        dtype: of the result.
    """
    odd = 2 * torch.arange(size, device=columns.device) + 1
    angles = (odd[:, None] * columns.long()[None, :]) % (4 * size)
    waves = torch.cos(angles.double() * (math.pi / (2 * size)))
    factors = math.sqrt(2 / size) * (1 - (1 - math.sqrt(1 / 2)) * (columns == 0).double())
    return waves.mul_(factors).to(dtype)


class CosineView(SubspaceView):
    """The state holds the chosen columns under ``columns``, (r,) int32, ascending."""

    def choose(self, grad_SL: Tensor, state: State) -> None:
        """Choose the columns with the largest norms, and carry over the moments of those kept."""
        size = grad_SL.shape[0]
        every = torch.arange(size, device=grad_SL.device)
        all_SS = cosine_columns(size, every, grad_SL.dtype)
        norms = (all_SS.T @ grad_SL).norm(dim=1)  # (short, short) @ (short, long)
        chosen = norms.topk(min(self.rank, size)).indices.sort().values.to(torch.int32)
        if "columns" in state:
            same_RR = (chosen[:, None] == state["columns"][None, :]).to(grad_SL.dtype)
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment] = same_RR @ state[moment]  # (r, r) @ (r, long)
        state["columns"] = chosen

    def basis(self, grad_SL: Tensor, state: State) -> Tensor:
        """Return the chosen columns of Q."""
        return cosine_columns(grad_SL.shape[0], state["columns"], grad_SL.dtype)


class DctAdamw(ProjectedMethod):
    """See :class:`sparsegrad_cli.methods.implementation.Method`."""

    settings: SubspaceSettings

    def view(self, target: Target, number: int) -> View:
        """Return the view in columns of the cosine transform."""
        chosen = self.settings
        return CosineView(chosen.rank, chosen.update_every, chosen.scale)
