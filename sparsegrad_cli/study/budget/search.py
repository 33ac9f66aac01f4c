"""The largest whole number whose figure is within a budget, in few looks."""

from __future__ import annotations

from collections.abc import Callable

_PATIENCE = 8  # looks along straight lines; then the middle is taken

Figure = Callable[[int], float]


def largest(figure: Figure, room: float, least: int, most: int, slack: float = 0.0) -> int | None:
    """The largest of ``least``..``most`` whose figure is within ``room``; None if none is.

    A figure is nearly a straight line, or several of growing slope, since bytes of a step are the
    most of what several moments need. So the chord from a size that fits to one that does not
    meets ``room`` at a size that fits, and the line through two that fit meets it beyond: taken by
    turns, they close in. The answer and its successor have both been looked at, unless less than
    ``slack`` of the budget is left.

    Args:
        figure: never falls as its argument grows; asked once for each argument.
        room: what may be spent.
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
    """Where the line through two known sizes meets ``room``, rounded down."""
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
    """:func:`largest` where the figure jumps at known sizes: first the level, then within it.

    Args:
        levels: how many there are.
        start: the first size of a level, from 0.
        most: the last size of the last level.
    """
    level = largest(lambda at: figure(start(at)), room, 0, levels - 1)
    if level is None:
        return None
    end = start(level + 1) - 1 if level + 1 < levels else most
    return largest(figure, room, start(level), end, slack)
