"""Score the entries of a core, and choose the best: exact counts, whatever the ties and the signs.

A core gradient is C = Q_out' G Q_in = (g Q_out)' (x Q_in); with h = g Q_out (N, r_out) and
u = x Q_in (N, r_in) it is a sum over tokens of h_n' u_n. Four scores, each a mean over steps:

``mean``          |mean of C|            the gradient of all steps together, noise cancelled
``gradient``      |C|                    the criterion of a single step
``square``        C^2                    the diagonal of the empirical Fisher, by batch
``token_square``  (h^2)' (u^2)           the same by token: no two tokens cancel

The fifth, ``spectral``, needs no pass over the data (:func:`spectral_scores`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from sparsegrad_cli.numerics.hosvd import Basis


def largest_entries(values: Tensor, count: int) -> Tensor:
    """Return flat positions of the ``count`` entries of largest magnitude, ascending.

    A threshold (``abs(v) >= quantile``) takes more than ``count`` entries where values tie, and
    one on the signed value misses the negative ones; a selection by rank does neither.

    Args:
        values: any shape.
        count: 1 to ``values.numel()``.

    Returns:
        (count,) int64.

    Raises:
        ValueError: ``count`` is out of range.
    """
    if not 1 <= count <= values.numel():
        raise ValueError(f"cannot choose {count} of {values.numel()} entries")
    flat = values.reshape(-1).abs()
    if count == flat.numel():
        return torch.arange(count, device=values.device)
    if flat.device.type == "cpu":
        # numpy's introselect does a third of the work of torch.topk's partial sort on the CPU.
        flat = flat.detach().to(torch.promote_types(flat.dtype, torch.float32))
        chosen: Tensor = _largest_unsorted(flat, count)
        return chosen.sort().values
    return torch.topk(flat, count, sorted=False).indices.sort().values


# An operator, not a function: torch then knows what shape comes out without looking at values, and
# a step can run on fake tensors (estimate/fake_tensors.py).
@torch.library.custom_op("sparsegrad::largest_unsorted", mutates_args=(), device_types="cpu")
def _largest_unsorted(flat: Tensor, count: int) -> Tensor:
    """Return positions of the ``count`` largest of (n,) float32 or float64, in any order."""
    array = flat.numpy()
    return torch.from_numpy(np.argpartition(array, array.size - count)[array.size - count :])


@_largest_unsorted.register_fake
def _(flat: Tensor, count: int) -> Tensor:
    return flat.new_empty(count, dtype=torch.int64)


def bounded(capacity: float | None, count: int, room: int) -> int | None:
    """Return how many entries may have optimizer state, at most ``room``; None for all."""
    return None if capacity is None else min(room, round(capacity * count))


def energy_share(matrix: Tensor, fraction: float, whole: Tensor | None = None) -> float:
    """Return the share of the squared entries that the largest ``fraction`` holds, 0 to 1.

    Args:
        matrix: any shape.
        fraction: of the entries of ``whole``.
        whole: what ``matrix`` is a part of, such as the gradient whose truncated core it is; by
            default itself.
    """
    whole = matrix if whole is None else whole
    count = min(matrix.numel(), max(1, round(fraction * whole.numel())))
    squares = matrix.reshape(-1).double().square()
    total = whole.double().square().sum()
    if total == 0:
        return 0.0
    return float(torch.topk(squares, count, sorted=False).values.sum() / total)


class ScoreStream:
    """The mean score of each entry of one target's core; memory does not grow with the stream.

    Args:
        basis: truncated to the core's rank.
        score: ``mean``, ``gradient``, ``square`` or ``token_square``.
    """

    def __init__(self, basis: Basis, score: str) -> None:
        if score not in ("mean", "gradient", "square", "token_square"):
            raise ValueError(f"unknown score {score!r}")
        self.basis, self.score = basis, score
        self.total = basis.q_out.new_zeros(basis.q_out.shape[1], basis.q_in.shape[1])
        self._step = torch.zeros_like(self.total)
        self.count = self.total.new_zeros(())

    def add_tokens(self, g_NO: Tensor, x_NI: Tensor) -> None:
        """Add tokens of the current step: dL/dy (N, out) and x (N, in), any floating dtype."""
        h_NR = g_NO.to(self.total.dtype) @ self.basis.q_out  # (N, out) @ (out, r_out)
        u_NS = x_NI.to(self.total.dtype) @ self.basis.q_in  # (N, in) @ (in, r_in)
        if self.score == "token_square":
            h_NR, u_NS = h_NR.square_(), u_NS.square_()
        self._step.addmm_(h_NR.T, u_NS)  # (r_out, N) @ (N, r_in)

    def end_step(self) -> None:
        """End a step: a layer that is used more than once has one gradient."""
        if self.score == "square":
            self._step.square_()
        elif self.score != "mean":
            self._step.abs_()
        self.total += self._step
        self._step.zero_()
        self.count += 1

    def mean(self) -> Tensor:
        """Return the mean over the steps, (r_out, r_in), not negative."""
        return (self.total / self.count.clamp_min(1)).abs_()

    def sums(self) -> list[Tensor]:
        """Return the sums over the stream, which are added up over processes."""
        return [self.total, self.count]


def spectral_scores(basis: Basis) -> Tensor:
    """Return the (r_out, r_in) products of the singular values of both sides.

    With Grams over tokens, sum g'g and sum x'x, the square of this is, if g and x are independent
    (a Kronecker-factored second moment), the number of tokens times the summed square of a core
    entry over tokens; its level sets are hyperbolas. It needs no second pass over the data.
    """
    return torch.outer(basis.singular_out, basis.singular_in)


def comparable_scores(score: Tensor, weight: Tensor | None, sharing: int = 1) -> Tensor:
    """Scale the spectral scores of a target so that they compare with those of other targets.

    With n tokens, h = g Q_out and u = x Q_in, the summed square of an entry of the core is

        sum_n h_ni^2 u_nj^2  =  (sum_n h_ni^2) (sum_n u_nj^2) / n  =  (s_i s_j)^2 / n

    for independent h and u; with token gradients, where the sums are weighted by |x|^2 and |g|^2,
    n becomes the sum of |g|^2 |x|^2. Without the division by sqrt(n), targets that few live tokens
    reach (the last block, where only one position matters to a classifier) get too few entries.

    Args:
        score: s_i s_j (:func:`spectral_scores`).
        weight: n, the weight of the tokens behind s (:class:`Basis`); None leaves the scores as
            they are.
        sharing: number of targets whose sums are in s together; each has its share of them.
    """
    if weight is None:
        return score
    return score / (weight * sharing).sqrt().to(score)


def allocate(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """Choose the ``count`` best entries over all targets at once, at least one in each.

    Args:
        scores: per target, any shape; comparable across targets.
        count: from the number of targets to the number of all entries.

    Returns:
        Per target flat positions, ascending; together exactly ``count``.

    Raises:
        ValueError: ``count`` is out of range.
    """
    room = sum(score.numel() for score in scores)
    if not len(scores) <= count <= room:
        raise ValueError(f"cannot choose {count} of {room} entries in {len(scores)} targets")
    flat = torch.cat([score.reshape(-1).float().cpu() for score in scores])
    starts = torch.tensor([0, *(score.numel() for score in scores)]).cumsum(0)
    # Each target's best entry comes first, whatever the others hold.
    for begin, end in pairwise(starts.tolist()):
        flat[begin + flat[begin:end].argmax()] = torch.inf
    chosen = largest_entries(flat, count)
    owner = torch.bucketize(chosen, starts[1:], right=True)
    return [
        (chosen[owner == number] - starts[number]).to(score.device)
        for number, score in enumerate(scores)
    ]
