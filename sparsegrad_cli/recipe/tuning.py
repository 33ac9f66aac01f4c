"""Define a study's ``tune`` section: trials, seeds and space, for every method. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, ValidationError, model_validator

from sparsegrad_cli.errors import Problem
from sparsegrad_cli.recipe.schema import TrainSection
from sparsegrad_cli.recipe.section import NonNegativeInt, Section

SEED = 101  # default seed of tuning; not one of the default seeds of the reported runs
Positive = Annotated[float, Field(gt=0)]


class RateSpace(Section):
    """Learning rates: log-uniform, the same number of decades about each method's centre."""

    decades: Annotated[float, Field(gt=0, le=6)] = 2.0
    centres: dict[str, Positive] = Field(
        {},
        description="a row's label to its centre; by default the study's own rate for that row, "
        "else one that was measured for its method (docs/compare.md)",
    )


class Range(Section):
    """Numbers from ``low`` to ``high``, uniform or log-uniform."""

    low: float
    high: float
    log: bool = False

    @model_validator(mode="after")
    def _is_one(self) -> Range:
        if self.low >= self.high:
            raise ValueError("low is below high")
        if self.log and self.low <= 0:
            raise ValueError("log needs a low above 0")
        return self


def _kind(value: Any) -> str:
    return "tuple[]" if isinstance(value, tuple) else "range[]"


# The union is decided by kind, so that an error refers to the intended kind. Errors leave out
# names with a bracket.
Numbers = Annotated[
    Annotated[Range, Tag("range[]")]
    | Annotated[tuple[float, ...], Field(min_length=2), Tag("tuple[]")],
    Discriminator(_kind),
]


class Space(Section):
    """The keys that are tuned: the learning rate and other keys of ``train``, for all methods.

    Keys that change the data, its order or the number of steps cannot be tuned.
    """

    learning_rate: RateSpace = RateSpace()
    lr_scheduler_type: Annotated[tuple[str, ...], Field(min_length=2)] | None = None
    warmup_steps: Numbers | None = None
    weight_decay: Numbers | None = None
    adam_beta1: Numbers | None = None
    adam_beta2: Numbers | None = None
    adam_epsilon: Numbers | None = None
    max_grad_norm: Numbers | None = None

    def named(self) -> dict[str, Range | tuple[Any, ...]]:
        """Return the tuned keys other than the learning rate, without ``train.``."""
        found = {key: getattr(self, key) for key in type(self).model_fields}
        del found["learning_rate"]
        return {key: value for key, value in found.items() if value is not None}

    @model_validator(mode="after")
    def _recipes_take_it(self) -> Space:
        for key, over in self.named().items():
            values = (over.low, over.high) if isinstance(over, Range) else over
            if len(set(values)) < len(values):
                raise ValueError(f"{key} names a value twice")
            if {"constant", "constant_with_warmup"} <= set(values):
                raise ValueError(
                    "lr_scheduler_type: 'constant' and 'constant_with_warmup' are one scheduler; "
                    "tune warmup_steps"
                )
            if key == "warmup_steps" and isinstance(over, Range) and over.low < 1 <= over.high:
                raise ValueError(
                    "warmup_steps: a value below 1 is a share of all steps, and from 1 on it is a "
                    "number of steps; a range is of one kind"
                )
            for value in values:
                try:
                    TrainSection.model_validate({"warmup_steps": 0, key: value})
                except ValidationError as error:
                    what = error.errors(include_url=False)[0]["msg"]
                    raise ValueError(f"train.{key} cannot be {value!r}: {what}") from None
        return self


class Tune(Section):
    """Every method gets the same number of trials on every task before the first run."""

    trials: Annotated[int, Field(ge=2, le=1000)] = 8
    seeds: tuple[NonNegativeInt, ...] = Field(
        (SEED,), min_length=1, description="each trial runs under all of them; none is reported"
    )
    space: Space = Space()

    def keys(self) -> list[str]:
        """Return the recipe keys that are tuned."""
        return ["train.learning_rate", *(f"train.{key}" for key in self.space.named())]


def tuning_problems(
    tune: Tune,
    seeds: Sequence[int],
    labels: Sequence[str],
    overridden: Sequence[str],
    source: str,
) -> list[Problem]:
    """Return the problems of a study's tuning.

    Args:
        tune: the ``tune`` section.
        seeds: seeds of the reported runs.
        labels: labels of the study's rows.
        overridden: dotted keys that the command line sets.
        source: name of the study, for messages.
    """
    from sparsegrad_cli.io.suggest import suggest

    problems = []
    both = sorted(set(tune.seeds) & set(seeds))
    if both:
        what = f"{', '.join(map(str, both))}: reported, too, and so no measure of what was tuned"
        fix = f"other seeds, such as {max((*seeds, SEED - 1)) + 1}"
        problems.append(Problem("tune.seeds", what, source, None, fix))
    if len(set(tune.seeds)) < len(tune.seeds):
        problems.append(Problem("tune.seeds", "names a seed twice", source))
    for label in sorted(set(tune.space.learning_rate.centres) - set(labels)):
        what = f"{label!r} is no row of this study"
        key = "tune.space.learning_rate.centres"
        problems.append(Problem(key, what, source, None, suggest(label, tuple(labels))))
    for key in sorted(set(tune.keys()) & set(overridden)):
        fix = "leave it out, or give tune.space.learning_rate.centres"
        if key != "train.learning_rate":
            fix = "leave it out, or take it out of tune.space"
        problems.append(Problem(key, "is tuned", "command line", None, fix))
    return problems
