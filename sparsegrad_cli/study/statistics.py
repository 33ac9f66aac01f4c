"""Mean, spread, intervals, a paired test that assumes next to nothing, and Holm's correction.

The formulas are written out in docs/compare.md; scipy gives Student's distribution and no more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

LEVEL = 0.05  # of every test; intervals hold 1 - LEVEL
EXACT = 32  # up to so many differences every choice of signs is counted
DRAWS = 99_999  # beyond, so many are drawn
ROUNDING = 1e-12  # of float64 scores of about 1, with room; no metric is told apart so finely


def mean(values: Sequence[float]) -> float | None:
    """Arithmetic mean, or None of nothing."""
    return math.fsum(values) / len(values) if values else None


def std(values: Sequence[float]) -> float | None:
    """Sample standard deviation (n - 1), or None below two values."""
    if len(values) < 2:
        return None
    centre = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - centre) ** 2 for v in values) / (len(values) - 1))


class Student(NamedTuple):
    """What Student's t says of a mean: its 95 % interval, and the two-sided p of zero."""

    low: float
    high: float
    p: float


def student(groups: Sequence[Sequence[float]]) -> Student | None:
    """Student's t for the mean over groups of the mean within each.

    With one group this is the textbook's: mean ± t s / sqrt(n), n - 1 degrees of freedom. With
    several, the groups (tasks) are given and only their members (seeds) are drawn: the variance is
    the sum of s_g^2 / n_g over G groups, divided by G^2, with Satterthwaite's degrees of freedom.

    Args:
        groups: values of each group.

    Returns:
        None without groups, where one has fewer than two values, and where all spread is zero but
        for rounding: few equal values do not say that the next would be equal, too.
    """
    if not groups or any(len(group) < 2 for group in groups):
        return None
    from scipy import stats

    count = len(groups)
    centre = math.fsum(math.fsum(group) / len(group) for group in groups) / count
    parts = [(std(group) or 0.0) ** 2 / len(group) / count**2 for group in groups]
    error = math.sqrt(math.fsum(parts))
    largest = max(abs(value) for group in groups for value in group)
    if error <= ROUNDING * max(1.0, largest):  # differences of scores near 1 round as those do
        return None
    shares = (part**2 / (len(group) - 1) for part, group in zip(parts, groups, strict=True))
    freedom = math.fsum(parts) ** 2 / math.fsum(shares)
    half = float(stats.t.ppf(1 - LEVEL / 2, freedom)) * error
    p = float(2 * stats.t.sf(abs(centre) / error, freedom))
    return Student(centre - half, centre + half, p)


def sign_flip_p(values: Sequence[float]) -> float:
    """Two-sided p of a sum, if each value's sign were a coin's (Fisher 1935, section 21).

    p is the share of all 2^n choices of signs whose sum is at least as far from zero. All are
    counted up to ``EXACT`` values, half by half: of the sums of the first half, how many of the
    second's take each as far. Beyond, ``DRAWS`` choices are drawn, always the same, and
    p = (1 + found) / (1 + drawn).

    Args:
        values: differences, standardised where their scales are unlike. Zeros say nothing.
    """
    import numpy as np

    kept = np.array([value for value in values if value != 0], dtype=np.float64)
    observed = abs(float(kept.sum()))
    slack = 1e-9 * float(np.abs(kept).sum())  # sums that differ in their last bits are equal
    if observed <= slack:
        return 1.0
    if len(kept) <= EXACT:
        first = _all_sums(kept[: len(kept) // 2])
        second = np.sort(_all_sums(kept[len(kept) // 2 :]))
        short = np.searchsorted(second, observed - slack - first, side="left")
        beyond = len(first) * len(second) - int(short.sum())
        return min(1.0, 2.0 * beyond / 2.0 ** len(kept))  # and as many on the other side
    generator = np.random.default_rng(0)
    found = 0
    for start in range(0, DRAWS, 9_999):
        draws = min(9_999, DRAWS - start)
        signs = 2.0 * generator.integers(0, 2, (draws, len(kept))) - 1.0
        found += int((np.abs(signs @ kept) >= observed - slack).sum())
    return (1 + found) / (1 + DRAWS)


def _all_sums(values: Any) -> Any:
    """The 2^n sums of ±values, (2^n,) float64."""
    import numpy as np

    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums + value, sums - value])
    return sums


def smallest_p(values: Sequence[float]) -> float:
    """The least that :func:`sign_flip_p` could say of values of these sizes: all of one sign."""
    return sign_flip_p([abs(value) for value in values])


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (Holm 1979).

    The i-th smallest of m is multiplied by m - i + 1, none is smaller than the one before it, and
    none above 1. Rejecting what is at most alpha then wrongly rejects anything at all with a
    probability of at most alpha, however the tests hang together.
    """
    adjusted = [1.0] * len(ps)
    least = 0.0
    for rank, at in enumerate(sorted(range(len(ps)), key=lambda index: ps[index])):
        least = max(least, min(1.0, (len(ps) - rank) * ps[at]))
        adjusted[at] = least
    return adjusted
