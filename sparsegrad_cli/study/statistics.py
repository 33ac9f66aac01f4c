"""Compute means, deviations, confidence intervals, a permutation test and Holm's correction.

docs/explanation/statistics.md explains the formulas. scipy is used only for Student's distribution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

LEVEL = 0.05  # significance level of every test; intervals cover 1 - LEVEL
EXACT = 32  # up to this number of differences, every choice of signs is counted
DRAWS = 99_999  # number of random choices of signs beyond that
POWER = 0.8  # probability with which `seeds_needed` seeds show a difference
MOST_SEEDS = 10_000  # `seeds_needed` searches no further
ROUNDING = 1e-12  # above the rounding of float64 scores near 1, below any real difference


def mean(values: Sequence[float]) -> float | None:
    """Return the arithmetic mean; None without values."""
    return math.fsum(values) / len(values) if values else None


def std(values: Sequence[float]) -> float | None:
    """Return the sample standard deviation (n - 1); None below two values."""
    if len(values) < 2:
        return None
    centre = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - centre) ** 2 for v in values) / (len(values) - 1))


class Student(NamedTuple):
    """Student's t for a mean: its 95 % interval, and the two-sided p-value for a mean of zero."""

    low: float
    high: float
    p: float


def student(groups: Sequence[Sequence[float]]) -> Student | None:
    """Return Student's t for the mean over groups of the mean within each group.

    With one group this is the textbook formula: mean ± t s / sqrt(n), n - 1 degrees of freedom.
    With several, the groups (tasks) are fixed and their members (seeds) are random: the variance is
    the sum of s_g^2 / n_g over G groups, divided by G^2, with Satterthwaite's degrees of freedom.

    Args:
        groups: values of each group.

    Returns:
        Interval and p-value. None if there are no groups, if a group has fewer than two values, or
        if the values are equal up to rounding: a few equal values do not mean that the next value
        would be equal, too.
    """
    if not groups or any(len(group) < 2 for group in groups):
        return None
    from scipy import stats

    count = len(groups)
    centre = math.fsum(math.fsum(group) / len(group) for group in groups) / count
    parts = [(std(group) or 0.0) ** 2 / len(group) / count**2 for group in groups]
    error = math.sqrt(math.fsum(parts))
    largest = max(abs(value) for group in groups for value in group)
    if error <= ROUNDING * max(1.0, largest):  # differences have the rounding of scores near 1
        return None
    shares = (part**2 / (len(group) - 1) for part, group in zip(parts, groups, strict=True))
    freedom = math.fsum(parts) ** 2 / math.fsum(shares)
    half = float(stats.t.ppf(1 - LEVEL / 2, freedom)) * error
    p = float(2 * stats.t.sf(abs(centre) / error, freedom))
    return Student(centre - half, centre + half, p)


def sign_flip_p(values: Sequence[float]) -> float:
    """Return the two-sided p-value of a sum under random signs (Fisher 1935, section 21).

    p is the share of all 2^n choices of signs whose sum is at least as far from zero. Up to
    ``EXACT`` values, all choices are counted: for each sum of the first half of the values, count
    the sums of the second half with which the total is that far. Beyond that, ``DRAWS`` choices are
    drawn with a fixed seed, and p = (1 + found) / (1 + drawn).

    Args:
        values: differences, standardised if their scales differ. Zeros are ignored.
    """
    import numpy as np

    kept = np.array([value for value in values if value != 0], dtype=np.float64)
    observed = abs(float(kept.sum()))
    slack = 1e-9 * float(np.abs(kept).sum())  # treat sums that differ by rounding as equal
    if observed <= slack:
        return 1.0
    if len(kept) <= EXACT:
        first = _all_sums(kept[: len(kept) // 2])
        second = np.sort(_all_sums(kept[len(kept) // 2 :]))
        short = np.searchsorted(second, observed - slack - first, side="left")
        beyond = len(first) * len(second) - int(short.sum())
        return min(1.0, 2.0 * beyond / 2.0 ** len(kept))  # the other side has the same number
    generator = np.random.default_rng(0)
    found = 0
    for start in range(0, DRAWS, 9_999):
        draws = min(9_999, DRAWS - start)
        signs = 2.0 * generator.integers(0, 2, (draws, len(kept))) - 1.0
        found += int((np.abs(signs @ kept) >= observed - slack).sum())
    return (1 + found) / (1 + DRAWS)


def _all_sums(values: Any) -> Any:
    """Return the 2^n sums of ±values, (2^n,) float64."""
    import numpy as np

    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums + value, sums - value])
    return sums


def smallest_p(values: Sequence[float]) -> float:
    """Return the smallest :func:`sign_flip_p` for values of these sizes: all have one sign."""
    return sign_flip_p([abs(value) for value in values])


def seeds_needed(groups: Sequence[Sequence[float]], tests: int) -> int | None:
    """Return the number of seeds that would show a difference like the observed one.

    It is the smallest N that meets two conditions, both at the level ``LEVEL / tests``, which is
    the strictest step of Holm's correction:

    - N seeds on each of G tasks can give a small enough p at all: 2^(1 - N G) for the sign-flip
      test.
    - :func:`student` finds the difference with probability ``POWER`` (noncentral t), if further
      seeds have the mean and the standard deviation of the observed ones.

    Args:
        groups: the observed differences of each task, at least two in each.
        tests: number of pairs of methods that are tested together.

    Returns:
        N, at most ``MOST_SEEDS``; None if the mean difference is zero, which no number of seeds
        would show.
    """
    count = len(groups)
    centre = math.fsum(math.fsum(group) / len(group) for group in groups) / count
    largest = max(abs(value) for group in groups for value in group)
    if abs(centre) <= ROUNDING * max(1.0, largest):
        return None
    level = LEVEL / tests
    variances = [(std(group) or 0.0) ** 2 for group in groups]
    low, high = max(2, math.ceil((1 - math.log2(level)) / count)), MOST_SEEDS
    while low < high:
        middle = (low + high) // 2
        if _power(abs(centre), variances, middle, level) >= POWER:
            high = middle
        else:
            low = middle + 1
    return low


def _power(centre: float, variances: Sequence[float], seeds: int, level: float) -> float:
    """Return the probability that Student's t with ``seeds`` values per group is significant."""
    from scipy import stats

    parts = [variance / seeds / len(variances) ** 2 for variance in variances]
    error = math.sqrt(math.fsum(parts))
    if error <= ROUNDING * centre:
        return 1.0
    freedom = math.fsum(parts) ** 2 / math.fsum(part**2 / (seeds - 1) for part in parts)
    critical = float(stats.t.isf(level / 2, freedom))
    effect = centre / error
    if effect > critical + 10:  # scipy's noncentral t overflows for large effects
        return 1.0
    return float(stats.nct.sf(critical, freedom, effect))


def holm(ps: Sequence[float]) -> list[float]:
    """Return p-values adjusted by Holm's step-down method (Holm 1979).

    The i-th smallest of m p-values is multiplied by m - i + 1; none is smaller than the one before
    it, and none is above 1. If every hypothesis with an adjusted p-value of at most alpha is
    rejected, the probability of any false rejection is at most alpha, even for dependent tests.
    """
    adjusted = [1.0] * len(ps)
    least = 0.0
    for rank, at in enumerate(sorted(range(len(ps)), key=lambda index: ps[index])):
        least = max(least, min(1.0, (len(ps) - rank) * ps[at]))
        adjusted[at] = least
    return adjusted
