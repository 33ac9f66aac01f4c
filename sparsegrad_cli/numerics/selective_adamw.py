"""AdamW that touches few entries: moments and bias correction by each entry's own age.

Adam (Kingma & Ba 2015) with decoupled weight decay (Loshchilov & Hutter 2019), applied at step t
only to the entries chosen at t. Entries that are not chosen keep value and moments bit for bit.
The bias correction of an entry uses the number of times *it* was updated: one shared counter would
give a newly chosen entry a first step of up to 3x the learning rate (its moments are young, the
counter is old).

State is either dense (:class:`Moments`: twelve bytes for every entry of a target, updated or not)
or grows with the entries that are updated, up to a limit (:class:`BoundedMoments`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AdamW:
    """Hyper-parameters of one step."""

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Moments:
    """Dense state of one target, in the target's shape.

    Attributes:
        first, second: running means of the gradient and its square, float32.
        age: number of updates of each entry, int32.
    """

    first: Tensor
    second: Tensor
    age: Tensor

    @staticmethod
    def like(parameter: Tensor) -> Moments:
        """Return zero state for a parameter, in float32 or wider."""
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        zeros = torch.zeros_like(parameter, dtype=dtype, memory_format=torch.contiguous_format)
        return Moments(zeros, torch.zeros_like(zeros), torch.zeros_like(zeros, dtype=torch.int32))

    def places(self, indices: Tensor) -> Tensor:
        """Return where the state of these entries is: at their own positions."""
        return indices

    def join(self, indices: Tensor, square_k: Tensor, beta2: float) -> None:
        """Start entries that were never updated as if they had been updated from the beginning.

        At age 0 the first step of an entry is lr in size whatever its gradient is, and after a new
        choice many entries would make it at once. With age t, the steps so far, first moment 0 and
        second moment square (1 - beta2^t), the next gradient g gives a step of about
        lr (1 - beta1) g / sqrt(square).

        Args:
            indices: (k,) int64 flat positions; those that have an age are left alone.
            square_k: (k,) estimates of their squared gradients; 0 leaves an entry at age 0.
            beta2: decay of the second moment.
        """
        age, second = self.age.view(-1), self.second.view(-1)
        new = (age[indices] == 0) & (square_k > 0)
        steps = age.max()
        age[indices[new]] = steps
        second[indices[new]] = start_of_second(square_k[new].to(second), steps, beta2)


@dataclass
class BoundedMoments:
    """State of the updated entries of one target, in compact rows, up to a limit.

    At the limit, the entries that were not updated for longest lose their state. Such an entry
    keeps its value; chosen again, it starts as a new one (age 0), or as :meth:`join` starts it.
    Below the limit, the steps are those of dense state, bit for bit.

    Attributes:
        capacity: maximum number of rows; no step may choose more entries.
        positions: (n,) int32, ascending: the entry that each row belongs to.
        first, second: (n,) running means of the gradient and its square, float32 or wider.
        age: (n,) int32, updates of the entry since it has a row.
        last: (n,) int32, the last step that updated it.
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
        """Return state without rows, on the device of ``like``, in float32 or wider."""
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
        """Return the rows of the entries of one step; add rows for new entries.

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
        """Give new entries rows as if they had been updated in every step (:meth:`Moments.join`).

        Args:
            indices: as in :meth:`places`.
            square_k: (k,) estimates of their squared gradients; 0 leaves an entry at age 0.
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
        """Add rows of zeros for new entries, and drop the oldest rows if there is no room."""
        excess = len(self.positions) + len(new) - self.capacity
        keep = torch.arange(len(self.positions), device=new.device)
        if excess > 0:
            rank = self.last.clone()
            rank[in_use] = torch.iinfo(torch.int32).max  # rows that this step needs stay
            # A stable sort: among equal last steps, the lowest positions are dropped first.
            keep = torch.argsort(rank, stable=True)[excess:].sort().values
        positions, order = torch.cat((self.positions[keep], new)).sort()
        self.positions = positions
        for name in ("first", "second", "age", "last"):
            rows: Tensor = getattr(self, name)
            setattr(self, name, torch.cat((rows[keep], rows.new_zeros(len(new))))[order])


def start_of_second(square_k: Tensor, age: Tensor, beta2: float) -> Tensor:
    """Return the second moment whose bias-corrected value at an age is ``square_k``."""
    return square_k * (1 - torch.pow(beta2, age.to(square_k.dtype)))


def step_on_entries(
    indices: Tensor,
    grad_k: Tensor,
    value_k: Tensor,
    moments: Moments | BoundedMoments,
    adamw: AdamW,
) -> Tensor:
    """Make one AdamW step on chosen entries; update their moments in place.

    Args:
        indices: (k,) int64 flat positions, without repeats.
        grad_k: (k,) gradient there.
        value_k: (k,) parameter values there (weight decay acts on them).
        moments: state of the target, contiguous.
        adamw: hyper-parameters.

    Returns:
        (k,) the update to add to the values.
    """
    places = moments.places(indices)  # first, because it may add rows
    first, second, age = (m.view(-1) for m in (moments.first, moments.second, moments.age))
    grad_k = grad_k.to(first.dtype)
    m_k = torch.lerp(first[places], grad_k, 1 - adamw.beta1)
    v_k = second[places].mul_(adamw.beta2).addcmul_(grad_k, grad_k, value=1 - adamw.beta2)
    age_k = age[places] + 1
    first[places], second[places], age[places] = m_k, v_k, age_k
    age_k = age_k.to(first.dtype)
    correction1 = 1 - torch.pow(adamw.beta1, age_k)
    correction2 = 1 - torch.pow(adamw.beta2, age_k)
    denominator = v_k.div_(correction2).sqrt_().add_(adamw.eps)
    update = m_k.div_(correction1).div_(denominator).mul_(-adamw.lr)
    if adamw.weight_decay:
        update -= adamw.lr * adamw.weight_decay * value_k.to(update.dtype)
    return update


def sparse_step(
    parameter: Tensor,
    grad: Tensor,
    moments: Moments | BoundedMoments,
    adamw: AdamW,
    choose: Callable[[Tensor], Tensor],
) -> Tensor:
    """Choose entries of ``grad`` and step them, in place on a contiguous ``parameter``.

    Args:
        parameter, grad: same shape.
        choose: gradient -> (k,) flat positions.

    Returns:
        (k,) the chosen positions; k may be 0.
    """
    indices = choose(grad)
    if indices.numel():
        flat = parameter.view(-1)
        values = flat[indices]
        update = step_on_entries(indices, grad.reshape(-1)[indices], values, moments, adamw)
        flat[indices] = (values + update).to(flat.dtype)
    return indices
