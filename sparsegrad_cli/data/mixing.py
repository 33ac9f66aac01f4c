"""Mix the training rows of several sources in given proportions. Imports no torch."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from sparsegrad_cli.records.run import MixedSource

# A fixed seed, not the run's: the seeds of a comparison must share their training rows.
_SEED = 0

Until = Literal["first_exhausted", "all_exhausted"]


@dataclass(frozen=True)
class Mixture:
    """Which row of which source each training example is.

    Attributes:
        names: name of each source.
        weights: weight of each source, as in the recipe.
        sizes: number of training rows that each source has.
        rows: (source, row) of each training example, in order.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    sizes: tuple[int, ...]
    rows: list[tuple[int, int]]

    @property
    def positions(self) -> list[int]:
        """The position of each training example, if all sources are one after another."""
        starts = [sum(self.sizes[:number]) for number in range(len(self.sizes))]
        return [starts[source] + row for source, row in self.rows]

    def notes(self, unit: str) -> list[str]:
        """Return a note on the rows that the proportions leave out, if there are any.

        Args:
            unit: what a row is, in the plural.
        """
        taken = Counter(source for source, _ in set(self.rows))
        left_out = sum(self.sizes) - taken.total()
        if not left_out:
            return []
        each = ", ".join(
            f"{name} {taken[number]:,} of {size:,}"
            for number, (name, size) in enumerate(zip(self.names, self.sizes, strict=True))
        )
        most = "MOST DATA IS LEFT OUT: " if left_out > taken.total() else ""
        return [
            f"{most}the weights of task.mix take {taken.total():,} of {sum(self.sizes):,} training "
            f"{unit} ({each}); task.mix_until: all_exhausted takes all of them"
        ]

    def sources(self, kept: Iterable[int]) -> list[MixedSource]:
        """Return the record of each source.

        Args:
            kept: positions of the examples that are trained on, after limits.
        """
        taken = Counter(self.rows[position][0] for position in kept)
        return [
            MixedSource(name=name, weight=weight, rows=size, taken=taken[number])
            for number, (name, weight, size) in enumerate(
                zip(self.names, self.weights, self.sizes, strict=True)
            )
        ]


def mix(
    names: Sequence[str], weights: Sequence[float], sizes: Sequence[int], until: Until
) -> Mixture:
    """Choose the rows of a mixture at random, with a fixed seed.

    With ``first_exhausted`` the mixture is as large as it can be without a repeated row: the source
    that is smallest for its weight is taken whole, and rows of the others are left out. With
    ``all_exhausted`` every row is taken: the source that is largest for its weight once, and the
    others again from their beginning.

    Args:
        names: names of the sources.
        weights: proportions of their rows; they need not sum to 1.
        sizes: number of rows of each source, at least 1.
        until: see above.
    """
    whole = until == "all_exhausted"
    # Rows for each unit of weight: what the source allows that decides the size.
    per_weight = [size / weight for size, weight in zip(sizes, weights, strict=True)]
    scale = max(per_weight) if whole else min(per_weight)
    rows: list[tuple[int, int]] = []
    for number, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        wanted = round(scale * weight)
        wanted = max(size, wanted) if whole else min(size, max(1, wanted))
        shuffled = random.Random(f"{_SEED} {number}").sample(range(size), size)
        chosen = [*range(size)] * (wanted // size) + sorted(shuffled[: wanted % size])
        rows += [(number, row) for row in chosen]
    # train_sampling_strategy: sequential and task.train_limit must meet all sources.
    random.Random(_SEED).shuffle(rows)
    return Mixture(tuple(names), tuple(weights), tuple(sizes), rows)
