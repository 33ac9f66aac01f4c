"""Sequentially truncated HOSVD (Vannieuwenhoven, Vandebril & Meerbergen 2012), streamed.

The narrow side's basis first, over one pass; in a second pass every gradient is projected onto it,
and the wide side's Gram is that of the projected gradients: the directions of the wide side that
matter to a core of this rank, at r / narrow of the multiplications.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsegrad_cli.numerics.hosvd import Basis, kept_columns, principal_directions


class SequentialStream:
    """Two passes of gradients; see :class:`GramStream` for the contract.

    Args:
        out_features, in_features: shape of every gradient.
        rank: of the narrow side: a number, a share of its energy, or None for all.
        device, dtype: where and in what the sums are kept; float32 by default.
    """

    passes = 2

    def __init__(
        self,
        out_features: int,
        in_features: int,
        *,
        rank: int | float | None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.rank, self.count = rank, 0
        self.out_is_narrow = out_features <= in_features
        narrow, self._wide = sorted((out_features, in_features))
        self.gram = torch.zeros(narrow, narrow, device=device, dtype=dtype)
        self._narrow: tuple[Tensor, Tensor] | None = None

    def add(self, grad_OI: Tensor) -> None:
        """Add one gradient, (out, in), any floating dtype."""
        grad_OI = grad_OI.to(self.gram.dtype)
        grad_AB = grad_OI if self.out_is_narrow else grad_OI.T  # (narrow, wide)
        if self._narrow is None:
            self.gram.addmm_(grad_AB, grad_AB.T)  # (narrow, wide) @ (wide, narrow)
        else:
            projected_RB = self._narrow[0].T @ grad_AB  # (r, narrow) @ (narrow, wide)
            self.gram.addmm_(projected_RB.T, projected_RB)  # (wide, r) @ (r, wide)
        self.count += 1

    def add_tokens(self, g_NO: Tensor, x_NI: Tensor) -> None:
        """Raise: the two Grams of tokens have no common side to project.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("sequential truncation is for gradients of batches")

    def next_pass(self) -> None:
        """Fix the narrow side; the next gradients go to the wide one."""
        if self.count == 0:
            raise ValueError("no gradient was added")
        q, singular = principal_directions(self.gram)
        keep = kept_columns(singular, q.shape[1], self.rank)
        # The whole spectrum: the core's rank is derived from a share of its energy again.
        self._narrow = q[:, :keep].clone(), singular.clone()
        self.gram = self.gram.new_zeros(self._wide, self._wide)
        self.count = 0

    def basis(self) -> Basis:
        """Return the narrow side truncated and the wide one whole.

        Raises:
            ValueError: a pass is missing, or the sums are not finite.
        """
        if self.count == 0 or self._narrow is None:
            raise ValueError("no gradient was added")
        q_narrow, singular_narrow = self._narrow
        q_wide, singular_wide = principal_directions(self.gram)
        if self.out_is_narrow:
            return Basis(q_narrow, q_wide, singular_narrow, singular_wide)
        return Basis(q_wide, q_narrow, singular_wide, singular_narrow)

    def sums(self) -> list[Tensor]:
        """Return the sums over the stream, which are added up over processes."""
        return [self.gram]

    def nbytes(self) -> int:
        """Return the bytes of the sum."""
        return self.gram.numel() * self.gram.element_size()
