"""AdamW state for the entries that were stepped, and for no others, up to a limit.

Dense state holds twelve bytes for every entry of a target, whether it was ever touched or not. Here
state grows with the entries that are touched; at the limit, those that were not stepped for longest
lose theirs. A forgotten entry keeps its value; chosen again, it starts as a new one (age 0), which
its own bias correction allows for, or as :meth:`BoundedMoments.join` starts it. Below the limit the
steps are those of dense state, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class BoundedMoments:
    """State of one target in compact rows; the counterpart of :class:`Moments`.

    Attributes:
        capacity: rows at most; no step may choose more.
        positions: (n,) int32, ascending: the entry that each row belongs to.
        first, second: (n,) running means of the gradient and its square, float32 or wider.
        age: (n,) int32, how often the entry was updated since it has a row.
        last: (n,) int32, the step that updated it last.
        clock: () int32, steps so far.
    """

    capacity: int
    positions: Tensor
    first: Tensor
    second: Tensor
    age: Tensor
    last: Tensor
    clock: Tensor

    @staticmethod
    def empty(capacity: int, like: Tensor) -> BoundedMoments:
        """No rows yet; on the device of ``like``, in float32 or wider."""
        dtype = torch.promote_types(like.dtype, torch.float32)

        def integers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=like.device)

        numbers = torch.zeros(0, dtype=dtype, device=like.device)
        return BoundedMoments(
            capacity,
            integers(0),
            numbers,
            numbers.clone(),
            integers(0),
            integers(0),
            integers(),
        )

    def places(self, indices: Tensor) -> Tensor:
        """Rows of the entries of one step, made where there are none.

        Args:
            indices: (k,) int64 flat positions, ascending, without repeats.

        Returns:
            (k,) int64 rows; valid until the next call.

        Raises:
            ValueError: k is over the capacity.
        """
        if len(indices) > self.capacity:
            raise ValueError(f"{len(indices)} entries in one step, room for {self.capacity}")
        wanted = indices.to(torch.int32)
        rows = self._find(wanted)
        known = self._holds(rows, wanted)
        new = wanted[~known]
        if len(new):
            self._admit(new, rows[known])
            rows = self._find(wanted)
        self.clock += 1
        self.last[rows] = self.clock
        return rows

    def join(self, indices: Tensor, square_k: Tensor, beta2: float) -> None:
        """Give new entries rows as if they had been updated in every step; see
        :meth:`sparsegrad_cli.numerics.selective_adamw.Moments.join`.

        Args:
            indices: as in :meth:`places`.
            square_k: (k,) what is known of their squared gradients; 0 leaves an entry at age 0.
            beta2: decay of the second moment.
        """
        wanted = indices.to(torch.int32)
        rows = self._find(wanted)
        known = self._holds(rows, wanted)
        self._admit(wanted[~known], rows[known])
        new = ~known & (square_k > 0)
        rows = self._find(wanted[new])
        self.age[rows] = self.clock
        self.second[rows] = start_of_second(square_k[new].to(self.second), self.clock, beta2)

    def _find(self, wanted: Tensor) -> Tensor:
        return torch.searchsorted(self.positions, wanted)

    def _holds(self, rows: Tensor, wanted: Tensor) -> Tensor:
        if not len(self.positions):
            return torch.zeros_like(wanted, dtype=torch.bool)
        return self.positions[rows.clamp(max=len(self.positions) - 1)] == wanted

    def _admit(self, new: Tensor, in_use: Tensor) -> None:
        """Give new entries rows of zeros; forget the longest untouched if there is no room."""
        excess = len(self.positions) + len(new) - self.capacity
        keep = torch.arange(len(self.positions), device=new.device)
        if excess > 0:
            rank = self.last.clone()
            rank[in_use] = torch.iinfo(torch.int32).max  # what this step needs stays
            # A stable sort: among entries of equal rest, the lowest positions go first.
            keep = torch.argsort(rank, stable=True)[excess:].sort().values
        positions, order = torch.cat((self.positions[keep], new)).sort()
        self.positions = positions
        for name in ("first", "second", "age", "last"):
            rows: Tensor = getattr(self, name)
            setattr(self, name, torch.cat((rows[keep], rows.new_zeros(len(new))))[order])


def start_of_second(square_k: Tensor, age: Tensor, beta2: float) -> Tensor:
    """The second moment whose bias-corrected value at an age is ``square_k``."""
    return square_k * (1 - torch.pow(beta2, age.to(square_k.dtype)))
