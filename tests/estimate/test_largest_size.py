"""The search for the largest size within a budget finds what trying all sizes finds."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from sparsegrad_cli.estimate.largest_size import largest, largest_in_levels


class Looked:
    """A figure that counts its evaluations and allows one per size."""

    def __init__(self, figure: Callable[[int], float]) -> None:
        self._figure, self.asked = figure, list[int]()

    def __call__(self, size: int) -> float:
        assert size not in self.asked, "a fake was repeated"
        self.asked.append(size)
        return self._figure(size)


def every(figure: Callable[[int], float], room: float, least: int, most: int) -> int | None:
    """Return the answer by brute force."""
    return max((n for n in range(least, most + 1) if figure(n) <= room), default=None)


def moments(seed: int) -> Callable[[int], float]:
    """Return bytes like those of a step: the maximum of several straight lines."""
    draw = random.Random(seed)
    lines = [(draw.randrange(10_000), draw.randrange(0, 60)) for _ in range(draw.randrange(1, 5))]
    return lambda size: max(at + slope * size for at, slope in lines)


@pytest.mark.parametrize("seed", range(60))
def test_search_finds_what_trying_all_finds(seed: int) -> None:
    figure, draw = moments(seed), random.Random(seed)
    least, most = draw.randrange(1, 4), draw.randrange(4, 300)
    edges = [figure(least), figure(most)]
    for room in (*edges, edges[0] - 1, edges[1] - 1, draw.uniform(*edges), draw.uniform(*edges)):
        looked = Looked(figure)
        assert largest(looked, room, least, most) == every(figure, room, least, most)
        assert len(looked.asked) <= 20


@pytest.mark.parametrize("seed", range(20))
def test_search_is_correct_on_steps_and_curves(seed: int) -> None:
    draw = random.Random(seed)
    rises = [draw.choice([0, 0, 1, 500]) * draw.random() for _ in range(400)]
    totals = [sum(rises[: n + 1]) for n in range(400)]
    room = draw.uniform(totals[0], totals[-1])
    looked = Looked(totals.__getitem__)
    assert largest(looked, room, 0, 399) == every(totals.__getitem__, room, 0, 399)
    assert len(looked.asked) <= 8 + 10


def test_search_on_a_line_takes_four_evaluations() -> None:
    looked = Looked(lambda size: 1_000 + 20 * size)
    assert largest(looked, 123_456, 12, 7_000_000) == (123_456 - 1_000) // 20
    assert len(looked.asked) <= 4


def test_slack_saves_evaluations_within_its_bound() -> None:
    def bent(size: int) -> float:
        return float(size + max(0, size - 5_000) ** 1.5)

    exact, loose = Looked(bent), Looked(bent)
    best = largest(exact, 400_000, 1, 1_000_000)
    found = largest(loose, 400_000, 1, 1_000_000, slack=4_000)
    assert best is not None and found is not None and found <= best
    assert 400_000 - bent(found) <= 4_000
    assert len(loose.asked) < len(exact.asked)


def test_search_over_one_size_or_none() -> None:
    assert largest(lambda size: 5, 5, 3, 3) == 3
    assert largest(lambda size: 5, 4, 3, 3) is None


@pytest.mark.parametrize("room", [0, 20, 25, 124, 125, 160, 239, 240, 241, 5_000])
def test_search_finds_the_level_before_the_size(room: int) -> None:
    """Each level begins with a jump, like the rank of a core that follows from its size."""
    starts = [0, 10, 30, 60, 100, 150, 210, 280]
    jump = [20, 25, 60, 90, 150, 180, 240, 300]

    def figure(size: int) -> float:
        level = max(n for n, start in enumerate(starts) if start <= size)
        return jump[level] + 0.1 * size

    found = largest_in_levels(figure, room, len(starts), starts.__getitem__, 399)
    assert found == every(figure, room, 0, 399)
