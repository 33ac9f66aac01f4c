"""Numbers of parameters that train, and the rank of a core that they fill. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

FILL = 1 / 3
"""A support fills this share of the core, so that there is something to choose from."""
REFRESH_STEPS = 100
"""Optimizer steps between two choices of a support that is refreshed, by default."""
RANK_STEP = 8
"""Ranks that follow the number of parameters are multiples of it."""


def count_for_density(density: float, out_features: int, in_features: int) -> int:
    """Return round(density x out x in), at least 1.

    Raises:
        ValueError: density is not in (0, 1].
    """
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density {density} is not in (0, 1]")
    return max(1, round(density * out_features * in_features))


def split_by_size(total: int, sizes: Sequence[int]) -> list[int]:
    """Split ``total`` over matrices in proportion to their sizes, exactly and at least 1 each.

    One goes to each matrix; the others by largest remainders, of equal ones to the first.

    Args:
        total: from the number of matrices to the sum of their sizes.
        sizes: number of parameters of each matrix.

    Raises:
        ValueError: ``total`` is out of range.
    """
    room = sum(sizes)
    if not len(sizes) <= total <= room:
        raise ValueError(f"cannot split {total} of {room} parameters over {len(sizes)} matrices")
    rest, left = total - len(sizes), max(1, room - len(sizes))
    parts = [divmod(rest * (size - 1), left) for size in sizes]
    shares = [1 + whole for whole, _ in parts]
    by_remainder = sorted(range(len(sizes)), key=lambda at: -parts[at][1])
    for at in by_remainder[: total - sum(shares)]:
        shares[at] += 1
    return shares


def rank_for_counts(counts: Iterable[int], *, dense: bool) -> int:
    """Return the smallest multiple of 8 at which the largest count fills a third of the core.

    Args:
        counts: number of parameters that train in each matrix.
        dense: whether all of the core trains, so that the count fills all of it.
    """
    side = math.sqrt(max(counts) / (1 if dense else FILL))
    return RANK_STEP * math.ceil(side / RANK_STEP)
