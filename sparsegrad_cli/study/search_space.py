"""Define what is tuned for one method on one task: recipe keys, ranges, and the first points.

The learning rates of all methods span the same number of decades, about a centre for each method,
because a rate that suits one method is far off for another. Imports no Optuna.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sparsegrad_cli.recipe.load_recipe import digest, with_settings
from sparsegrad_cli.recipe.schema import Recipe
from sparsegrad_cli.recipe.study import Cell, LoadedStudy
from sparsegrad_cli.recipe.study_section import Range

RATE = "train.learning_rate"
_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19)


@dataclass(frozen=True)
class Dimension:
    """One recipe key and the values it may take: a range, or choices.

    Attributes:
        key: dotted recipe key.
        low, high: ends of a range, both included.
        log: whether the range is uniform in the logarithm.
        centre: the centre of a range of learning rates.
        centre_from: ``tune`` or ``study`` if that section names the centre, else ``measured``.
        choices: the values, in place of a range.
    """

    key: str
    low: float | None = None
    high: float | None = None
    log: bool = False
    centre: float | None = None
    centre_from: str | None = None
    choices: tuple[Any, ...] | None = None

    def at(self, share: float) -> Any:
        """Return the value at a share of the range, from 0 (the lowest or first value) to 1."""
        if self.choices is not None:
            return self.choices[min(int(share * len(self.choices)), len(self.choices) - 1)]
        low, high = self._ends()
        if self.log:
            return self.rounded(low * (high / low) ** share)
        return self.rounded(low + share * (high - low))

    def rounded(self, value: Any) -> Any:
        """Round a number to four digits, which a report shows."""
        if self.choices is not None:
            return value
        low, high = self._ends()
        if self.key == "train.warmup_steps" and low >= 1:
            value = round(value)  # a number of steps, not a share
        return min(max(_digits(value), low), high)

    def to_json(self) -> dict[str, Any]:
        """Return the dimension as compare.json records it."""
        found = {key: value for key, value in asdict(self).items() if value is not None}
        return found | ({"choices": list(self.choices)} if self.choices is not None else {})

    def _ends(self) -> tuple[float, float]:
        assert self.low is not None and self.high is not None
        return self.low, self.high


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


@dataclass(frozen=True)
class Series:
    """The trials of one method on one task, for all seeds or for one.

    Attributes:
        task, label: the task, and the label of the method's row.
        space: what is tuned.
        recipe: the row's recipe; its tuned keys and its seed are ignored.
        seeds: the seeds of every trial.
        seed: the seed that is tuned by itself; None if all seeds share the settings.
    """

    task: str
    label: str
    space: tuple[Dimension, ...]
    recipe: Recipe
    seeds: tuple[int, ...]
    seed: int | None = None

    @property
    def name(self) -> str:
        """The name of the series, such as ``glue/rte lora``."""
        return f"{self.task} {self.label}" + ("" if self.seed is None else f" seed {self.seed}")

    @property
    def shift(self) -> float:
        """Share of the span by which the first points are moved, the same for all methods."""
        if self.seed is None:
            return 0.0
        return int(hashlib.sha256(f"{self.task} {self.seed}".encode()).hexdigest()[:8], 16) / 2**32

    def about(self) -> dict[str, Any]:
        """Return what all trials of the series have in common, which identifies it."""
        common = with_settings(self.recipe, first_point(self.space, 0), seed=0)
        space = [dimension.to_json() for dimension in self.space]
        return {"space": space, "seeds": list(self.seeds), "recipe": digest(common)}


def series_of(study: LoadedStudy) -> list[Series]:
    """Return a series for every method on every task, in the order of the runs.

    If every seed is tuned by itself, there is one for every run.
    """
    tune = study.study.tune
    assert tune is not None
    found: dict[tuple[str, str, int | None], Series] = {}
    for cell in study.cells:
        seed = cell.seed if tune.own else None
        key = (cell.task, cell.label, seed)
        if key not in found:
            space, recipe = space_of(study, cell), cell.loaded.recipe
            found[key] = Series(cell.task, cell.label, space, recipe, tune.seeds_for(seed), seed)
    return list(found.values())


def space_of(study: LoadedStudy, cell: Cell) -> tuple[Dimension, ...]:
    """Return the space of a method on a task: the learning rate, shared keys, and its own."""
    assert study.study.tune is not None
    space = study.study.tune.space
    centre, origin = _centre(study, cell)
    reach = 10 ** (space.learning_rate.decades / 2)
    ends = (_digits(centre / reach), _digits(centre * reach))
    found = [Dimension(RATE, *ends, log=True, centre=centre, centre_from=origin)]
    keys = {f"train.{name}": over for name, over in space.named().items()}
    for key, over in (keys | space.rows.get(cell.label, {})).items():
        if isinstance(over, Range):
            found.append(Dimension(key, over.low, over.high, over.log))
        else:
            found.append(Dimension(key, choices=over))
    return tuple(found)


def _centre(study: LoadedStudy, cell: Cell) -> tuple[float, str]:
    """Return the centre of a row's learning rates, and where it comes from.

    A centre that the study names comes first, then the row's own rate, then the measured one.
    """
    assert study.study.tune is not None
    named = study.study.tune.space.learning_rate.centres.get(cell.label)
    if named is not None:
        return named, "tune"
    own = [entry.train for entry in study.study.methods if entry.label == cell.label]
    own += [
        task.methods.get(cell.label, {}) for task in study.study.tasks if task.name == cell.task
    ]
    if any("learning_rate" in train for train in own):
        return cell.loaded.recipe.train.learning_rate, "study"
    return cell.loaded.recipe.method.learning_rate_center, "measured"


def first_point(space: Sequence[Dimension], number: int, shift: float = 0.0) -> dict[str, Any]:
    """Return the ``number``-th of the first points, by recipe key.

    The points are a Halton sequence (1960). Learning rates lie at 1/2, 1/4, 3/4, 1/8, 5/8, 3/8, 7/8
    of the span, so that few trials cover it and the first is its centre. The next keys use thirds,
    fifths and so on. ``shift`` moves all points by a share of the span, and those that leave it at
    one end enter it at the other (Cranley and Patterson 1976).
    """
    return {
        dimension.key: dimension.at((_halton(number + 1, prime) + shift) % 1)
        for dimension, prime in zip(space, _PRIMES, strict=False)
    }


def _halton(index: int, base: int) -> float:
    """Return the radical inverse of ``index``: its digits in ``base``, mirrored at the point."""
    share, unit = 0.0, 1.0
    while index:
        index, digit = divmod(index, base)
        unit /= base
        share += digit * unit
    return share
