"""Find the largest integer at which a growing function stays within a limit."""

from __future__ import annotations

import functools
from collections.abc import Callable

_PATIENCE = 8  # evaluations by linear interpolation; after that, by bisection
MOST = 65_536  # examples; larger batches have other limits than memory
_STRIDE = 8  # largest factor between two batches that are tried upwards

Figure = Callable[[int], float]


def largest(figure: Figure, room: float, least: int, most: int, slack: float = 0.0) -> int | None:
    """Return the largest of ``least``..``most`` with ``figure`` within ``room``; None if none is.

    The figure is nearly linear, or piecewise linear with growing slopes, since the bytes of a step
    are the maximum over several moments. The chord from a size that fits to one that does not
    therefore meets ``room`` at a size that fits, and the line through two sizes that fit meets it
    beyond the largest such size. Used alternately, they narrow the interval. The result and its
    successor have both been evaluated, unless less than ``slack`` of the room is left.

    Args:
        figure: must not decrease; called once for each argument.
        room: the limit.
        least, most: the first and the last candidate.
        slack: part of the room that may stay unused.
    """
    known = {least: figure(least)}
    if known[least] > room:
        return None
    if most > least:
        known[most] = figure(most)
    if known[most] <= room:
        return most
    low, before, high = least, least, most
    while high - low > 1 and room - known[low] > slack:
        if len(known) > _PATIENCE:
            guess = (low + high) // 2
        elif len(known) % 2 or before == low:
            guess = _crossing(known, low, high, room)
        else:
            guess = _crossing(known, before, low, room)
        guess = min(max(guess, low + 1), high - 1)
        known[guess] = figure(guess)
        if known[guess] <= room:
            before, low = low, guess
        else:
            high = guess
    return low


def _crossing(known: dict[int, float], first: int, second: int, room: float) -> int:
    """Return the size at which the line through two known sizes meets ``room``, rounded down."""
    rise = (known[second] - known[first]) / (second - first)
    return int(first + (room - known[first]) / rise) if rise > 0 else second


def largest_in_levels(
    figure: Figure,
    room: float,
    levels: int,
    start: Callable[[int], int],
    most: int,
    slack: float = 0.0,
) -> int | None:
    """Do the same for a figure that jumps at known sizes: find the level, then the size in it.

    Args:
        figure, room, slack: see :func:`largest`.
        levels: number of levels.
        start: returns the first size of a level; levels are counted from 0.
        most: the last size of the last level.
    """
    level = largest(lambda at: figure(start(at)), room, 0, levels - 1)
    if level is None:
        return None
    end = start(level + 1) - 1 if level + 1 < levels else most
    return largest(figure, room, start(level), end, slack)


def largest_batch(peak: Callable[[int], int], room: int) -> tuple[int, int]:
    """Return the largest batch whose peak is within ``room``, and that peak.

    The result and the next larger batch have both been evaluated. If not even one example fits,
    the batch is 0 and the peak is that of a batch of 1.

    Args:
        peak: returns the bytes at a batch of 1 to ``MOST`` examples; grows with the batch.
        room: the limit in bytes.
    """
    known = functools.cache(peak)
    if known(1) > room:
        return 0, known(1)
    low, high = 1, 2
    while high < MOST and known(high) <= room:
        ahead = _crossing({low: known(low), high: known(high)}, low, high, room)
        low, high = high, min(max(ahead + 1, 2 * high), _STRIDE * high, MOST)
    batch = largest(known, room, low, high)
    assert batch is not None  # the lower bound fits
    return batch, known(batch)
