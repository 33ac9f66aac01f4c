"""What is tuned, for one method on one task: its dimensions, first points, and what chooses.

Every method's learning rates span as many decades. Where they lie is the method's own: an entry of
S is no entry of W, and a rate that suits one method is far off for another. Imports no optuna.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sparsegrad_cli.recipe.load_recipe import check, digest, to_plain
from sparsegrad_cli.recipe.schema import Recipe
from sparsegrad_cli.recipe.source import Layer
from sparsegrad_cli.recipe.study import Cell, LoadedStudy
from sparsegrad_cli.recipe.tuning import Range
from sparsegrad_cli.records.metric_direction import scale_of

RATE = "train.learning_rate"
_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19)


@dataclass(frozen=True)
class Dimension:
    """One recipe key and the values it may take: a range, or choices.

    Attributes:
        key: dotted recipe key.
        low, high: ends of a range, both part of it.
        log: uniform in the logarithm.
        centre: of learning rates.
        centre_from: ``tune`` or ``study``, whichever names it, or ``measured``.
        choices: in place of a range.
    """

    key: str
    low: float | None = None
    high: float | None = None
    log: bool = False
    centre: float | None = None
    centre_from: str | None = None
    choices: tuple[Any, ...] | None = None

    def at(self, share: float) -> Any:
        """The value so far along: 0 is the lowest or the first, 1 the highest or the last."""
        if self.choices is not None:
            return self.choices[min(int(share * len(self.choices)), len(self.choices) - 1)]
        low, high = self._ends()
        if self.log:
            return self.rounded(low * (high / low) ** share)
        return self.rounded(low + share * (high - low))

    def rounded(self, value: Any) -> Any:
        """Four digits of a number say enough, and are what the report can show."""
        if self.choices is not None:
            return value
        low, high = self._ends()
        if self.key == "train.warmup_steps" and low >= 1:
            value = round(value)  # of steps
        return min(max(_digits(value), low), high)

    def _ends(self) -> tuple[float, float]:
        assert self.low is not None and self.high is not None
        return self.low, self.high

    def to_json(self) -> dict[str, Any]:
        """What compare.json says of it."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


@dataclass(frozen=True)
class Series:
    """The trials of one method on one task.

    Attributes:
        task, label: the method's row on the task.
        space: what is tuned.
        recipe: of the row; tuned keys and seed are those of any cell.
    """

    task: str
    label: str
    space: tuple[Dimension, ...]
    recipe: Recipe

    @property
    def name(self) -> str:
        """``glue/rte lora``."""
        return f"{self.task} {self.label}"

    def about(self, seeds: Sequence[int]) -> dict[str, Any]:
        """What its trials have in common: another such thing is another series."""
        common = with_settings(self.recipe, first_point(self.space, 0), seed=0)
        space = [dimension.to_json() for dimension in self.space]
        return {"space": space, "seeds": list(seeds), "recipe": digest(common)}


def series_of(study: LoadedStudy) -> list[Series]:
    """One a row and task, in the order of the cells."""
    first = {(cell.task, cell.label): cell for cell in reversed(study.cells)}
    order = dict.fromkeys((cell.task, cell.label) for cell in study.cells)
    return [Series(*key, space_of(study, first[key]), first[key].loaded.recipe) for key in order]


def space_of(study: LoadedStudy, cell: Cell) -> tuple[Dimension, ...]:
    """The space of a method on a task, as the study has it; the learning rate first."""
    assert study.study.tune is not None
    space = study.study.tune.space
    centre, origin = _centre(study, cell)
    reach = 10 ** (space.learning_rate.decades / 2)
    ends = (_digits(centre / reach), _digits(centre * reach))
    found = [Dimension(RATE, *ends, log=True, centre=centre, centre_from=origin)]
    for name, over in space.named().items():
        if isinstance(over, Range):
            found.append(Dimension(f"train.{name}", over.low, over.high, over.log))
        else:
            found.append(Dimension(f"train.{name}", choices=over))
    return tuple(found)


def _centre(study: LoadedStudy, cell: Cell) -> tuple[float, str]:
    """The study's word for this row counts before what was measured with small models."""
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


def first_point(space: Sequence[Dimension], number: int) -> dict[str, Any]:
    """The ``number``-th of the points that are tried first, by recipe key.

    Halton's sequence (1960): learning rates come at 1/2, 1/4, 3/4, 1/8, 5/8, 3/8, 7/8 of the way,
    so that few trials cover the span and the first is its centre; further keys in thirds, fifths...
    """
    return {
        dimension.key: dimension.at(_halton(number + 1, prime))
        for dimension, prime in zip(space, _PRIMES, strict=False)
    }


def _halton(index: int, base: int) -> float:
    """The digits of ``index`` in ``base``, mirrored at the point."""
    share, unit = 0.0, 1.0
    while index:
        index, digit = divmod(index, base)
        unit /= base
        share += digit * unit
    return share


def best_trial(trials: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The best validation score of the trials that are done; of equal ones the lowest loss, and of
    those the one tried first."""
    done = [trial for trial in trials if trial["status"] == "done"]
    return min(done, key=_rank, default=None)


def _rank(trial: Mapping[str, Any]) -> tuple[float, float, int]:
    loss = trial["loss"]
    return (
        -goodness(trial["score"], trial["metric"]),
        float("inf") if loss is None else loss,
        trial["number"],
    )


def goodness(score: float, metric: str | None) -> float:
    """The score, turned so that more is better."""
    return -score if scale_of(metric).lower_is_better else score


def edges(space: Sequence[Dimension], trials: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Where the best trial is the outermost that was tried: the optimum may lie beyond.

    Returns:
        ``{"key": ..., "end": "lowest" or "highest"}`` of each range of which this holds.
    """
    best = best_trial(trials)
    if best is None:
        return []
    found = []
    for dimension in space:
        if dimension.choices is not None:
            continue
        tried = [trial["settings"][dimension.key] for trial in trials]
        for end, outermost in (("lowest", min(tried)), ("highest", max(tried))):
            if best["settings"][dimension.key] == outermost:
                found.append({"key": dimension.key, "end": end})
    return found


def with_settings(recipe: Recipe, settings: Mapping[str, Any], seed: int | None = None) -> Recipe:
    """A recipe with some dotted keys set, checked, and perhaps under another seed.

    Raises:
        RecipeError: a value is none that its key could have.
    """
    plain = to_plain(recipe)
    for key, value in settings.items():
        section: Any = plain
        *path, name = key.split(".")
        for part in path:
            section = section[part]
        section[name] = value
    if seed is not None:
        plain["seed"] = seed
    return check(Layer(plain), Recipe)
