"""Say by one rule whether a learning curve still changes at its end.

The rule compares the last third of a curve's points with as many points before them. The curve
improves, or gets worse, if the means of the two differ by more than 10 % of the curve's whole
range. Otherwise it is flat. Captions quote both means, so that readers can judge for themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Literal, NamedTuple

CHANGE = 0.1  # Share of the range of a curve; smaller changes count as flat.
FEWEST = 3  # A curve with fewer points has no end to speak of.

Direction = Literal["improves", "flat", "worse"]


class Trend(NamedTuple):
    """How a curve ends: the means of the last ``length`` points and of as many before them."""

    direction: Direction
    length: int
    last: float
    before: float


def trend_of(
    points: Sequence[tuple[float, float]], *, lower_is_better: bool = False
) -> Trend | None:
    """Return how a curve ends.

    Args:
        points: (step, value), in order of the steps.
        lower_is_better: whether falling is improving.

    Returns:
        The trend; None if there are fewer than three points.
    """
    if len(points) < FEWEST:
        return None
    values = [value for _, value in points]
    length = len(values) // 3
    last, before = fmean(values[-length:]), fmean(values[-2 * length : -length])
    gain = (before - last) if lower_is_better else (last - before)
    least = CHANGE * (max(values) - min(values))
    direction: Direction = "improves" if gain > least else "worse" if gain < -least else "flat"
    return Trend(direction, length, last, before)
