"""Solve one method on one task under a budget of parameters or bytes: its size, and its batch.

The method's size is made as large as fits at the recipe's own batch. Only where not even the
smallest size fits is the batch made smaller; gradients then accumulate over as many micro-batches,
so that the update is that of the recipe's batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from sparsegrad_cli.estimate.search import largest, largest_in_levels
from sparsegrad_cli.methods.base import SizeRange, Sizing
from sparsegrad_cli.recipe.budget import Budget
from sparsegrad_cli.recipe.load_recipe import LoadedRecipe
from sparsegrad_cli.study.budget.batches import (
    at_batch,
    calibrated,
    calibrations,
    divisors,
    largest_batch,
)
from sparsegrad_cli.study.budget.counting import Counting

_SLACK = 1e-3  # share of a byte budget that a number of parameters may leave
SETTABLE = (
    "match",
    "method.rank",
    "method.density",
    "method.entries",
    "train.per_device_train_batch_size",
    "train.gradient_accumulation_steps",
    "calibration.batch_size",
    "calibration.steps",
)
OWN = "its own size, as the study says"
ALL = "every parameter of the targets trains"
FREE = "choosing more parameters takes no more memory: as many as the recipe says"


@dataclass(frozen=True)
class Pick:
    """The size and batch of a method under a budget.

    Attributes:
        recipe: the method at its size, with its batch.
        size: that size in words.
        predicted: what it will take, in the budget's unit.
        limit: why no more of the budget can be spent, where a larger size would not tell.
        larger: the next larger size in words, and what it would take.
        shape: [examples, tokens] that were counted, with ``shape_from`` in words.
        notes: what was assumed.
    """

    recipe: LoadedRecipe
    size: str
    predicted: float
    limit: str = ""
    larger: tuple[str, float] | None = None
    shape: list[int] | None = None
    shape_from: str | None = None
    notes: list[str] = field(default_factory=list)


class UnreachableError(Exception):
    """Not even the smallest size fits.

    Args:
        takes: what the smallest takes.
        size: the smallest in words.
        fix: what to do beside allowing more.
    """

    def __init__(self, takes: float, size: str, fix: str) -> None:
        super().__init__(size)
        self.takes, self.size, self.fix = takes, size, fix


def solve(loaded: LoadedRecipe, budget: Budget, counting: Counting, *, own_size: bool) -> Pick:
    """Return the method's size, and where necessary a smaller batch, under a budget.

    Args:
        own_size: the study names the method's size: it is kept.

    Raises:
        UnreachableError: the smallest size does not fit.
        SparsegradError: the recipe cannot be counted.
    """
    sizes = None if own_size else loaded.recipe.method.size_range(counting.shapes(loaded))
    fixed = OWN if own_size else ALL
    advice = ""
    if sizes is not None and budget.in_bytes and not sizes.costs_memory:
        advice, fixed, sizes = sizes.advice, FREE, None
    question = _Question(loaded, counting, budget.amount, sizes, fixed)
    if budget.kind == "trainable":
        return _trainable(question)
    if budget.kind == "optimizer_state":
        return _optimizer_state(question, advice)
    return _peak(question)


def at_size(loaded: LoadedRecipe, size: int) -> LoadedRecipe:
    """Return the recipe with its method at a size."""
    method = loaded.recipe.method.with_size(size)
    recipe = loaded.recipe.model_copy(update={"method": method, "match": None})
    return replace(loaded, recipe=recipe)


Figure = Callable[[LoadedRecipe], float]


@dataclass(frozen=True)
class _Sized:
    """The recipe at the largest size, and what stops it there; see :class:`Pick`."""

    recipe: LoadedRecipe
    limit: str = ""
    larger: tuple[str, float] | None = None


@dataclass(frozen=True)
class _Question:
    """A recipe and the room that its figure must stay within.

    Attributes:
        sizes: the sizes to choose from; None keeps the recipe's own.
        fixed: why the size is kept.
    """

    loaded: LoadedRecipe
    counting: Counting
    room: float
    sizes: SizeRange | None
    fixed: str

    def sizing(self, loaded: LoadedRecipe) -> Sizing:
        """Return the size of a recipe's method."""
        return loaded.recipe.method.sizing(self.counting.shapes(loaded))

    def text(self, loaded: LoadedRecipe) -> str:
        """Return the size of a recipe's method in words."""
        return self.sizing(loaded).text

    def at(self, size: int) -> LoadedRecipe:
        """Return the recipe with its method at a size."""
        return at_size(self.loaded, size)

    @property
    def least(self) -> LoadedRecipe:
        """The recipe at the smallest size."""
        return self.loaded if self.sizes is None else self.at(self.sizes.least)

    def solved(self, figure: Figure, slack: float = 0.0) -> _Sized | None:
        """Return the recipe at the largest size whose figure fits; None if none does.

        Args:
            slack: what may be left of the room, where sizes are fine.
        """
        sizes = self.sizes
        if sizes is None:
            return _Sized(self.loaded, self.fixed) if figure(self.loaded) <= self.room else None

        def at(size: int) -> float:
            return figure(self.at(size))

        levels = sizes.levels
        if levels is None:
            slack = slack if sizes.fine else 0.0
            size = largest(at, self.room, sizes.least, sizes.most, slack)
        else:
            count, most = len(levels), sizes.most
            size = largest_in_levels(at, self.room, count, levels.start, most, slack)
        if size is None:
            return None
        recipe = self.at(size)
        if size == sizes.most:
            return _Sized(recipe, sizes.limit)
        if sizes.fine and not (levels and levels.is_last(size)):
            return _Sized(recipe)  # one parameter more is not worth a line
        more = self.at(size + 1)
        return _Sized(recipe, larger=(self.text(more), figure(more)))


def _trainable(question: _Question) -> Pick:
    def count(loaded: LoadedRecipe) -> float:
        return question.sizing(loaded).trainable

    found = question.solved(count)
    if found is None:
        raise UnreachableError(count(question.least), question.text(question.least), "")
    text = question.text(found.recipe)
    return Pick(found.recipe, text, count(found.recipe), found.limit, found.larger)


def _optimizer_state(question: _Question, advice: str) -> Pick:
    counting = question.counting
    found = question.solved(counting.state)
    if found is None:
        least, fix = question.least, advice
        if least.recipe.scope == "rest":
            fix = "scope: head, where the rest of the model keeps none"
        raise UnreachableError(counting.state(least), question.text(least), fix)
    recipe, notes = found.recipe, counting.notes(found.recipe)
    taken = counting.state(recipe)
    return Pick(recipe, question.text(recipe), taken, found.limit, found.larger, notes=notes)


def _peak(question: _Question) -> Pick:
    loaded, counting, room = question.loaded, question.counting, question.room
    batch = largest_batch(question.least, counting, room)
    if batch is None:
        smallest = 1
        if not loaded.recipe.method.splits_batches:
            smallest = loaded.recipe.train.per_device_train_batch_size
        raise _too_much(question, at_batch(question.least, smallest))
    cut, slack = replace(question, loaded=at_batch(loaded, batch)), _SLACK * room
    found = cut.solved(counting.step, slack)
    assert found is not None  # the smallest size fits at this batch
    fitted = calibrated(found.recipe, counting, room)
    if fitted is None:  # bases and their making take what the step could spend

        def whole(at: LoadedRecipe) -> float:
            return max(counting.step(at), counting.calibration(calibrations(at)[-1]))

        found = cut.solved(whole, slack)
        fitted = None if found is None else calibrated(found.recipe, counting, room)
        if found is None or fitted is None:
            raise _too_much(cut, cut.least)
    longest, notes = counting.longest(fitted), counting.notes(fitted)
    if counting.evaluation(fitted) > room:
        notes.append("an evaluation needs more: a smaller train.per_device_eval_batch_size")
    return Pick(
        fitted,
        question.text(fitted),
        max(counting.step(fitted), counting.calibration(fitted)),
        found.limit,
        found.larger or _larger_batch(question, batch),
        [longest.size(batch), longest.width],
        longest.source,
        notes,
    )


def _too_much(question: _Question, least: LoadedRecipe) -> UnreachableError:
    """Return what a step of the smallest size takes, or its calibration where that is more."""
    counting, size = question.counting, question.text(least)
    step, width = counting.step(least), counting.longest(least).width
    making = counting.calibration(calibrations(least)[-1])
    if making > step:
        advice = ["calibration.basis: one that `sparsegrad calibrate` made where there was room"]
    else:
        advice = ["a shorter task.max_length"]
    if not least.recipe.train.gradient_checkpointing:
        advice.insert(0, "train.gradient_checkpointing: true")
    fix = " or ".join(advice)
    if making > step:
        return UnreachableError(making, f"{size}, calibration of 1 x {width} tokens", fix)
    batch = least.recipe.train.per_device_train_batch_size
    return UnreachableError(step, f"{size}, {batch} x {width} tokens", fix)


def _larger_batch(question: _Question, batch: int) -> tuple[str, float] | None:
    """Return what the next larger batch would take; None at the recipe's own."""
    whole = question.loaded.recipe.train.per_device_train_batch_size
    larger = [b for b in divisors(whole) if b > batch]
    if not larger:
        return None
    text = f"a batch of {larger[-1]}" + (
        "" if question.sizes is None else ", at the smallest size,"
    )
    return text, question.counting.step(at_batch(question.least, larger[-1]))


def settings_of(before: LoadedRecipe, after: LoadedRecipe) -> dict[str, Any]:
    """Return what a pick has set: dotted recipe key of :data:`SETTABLE` -> value."""

    def value(loaded: LoadedRecipe, key: str) -> Any:
        found: Any = loaded.recipe
        for part in key.split("."):
            found = getattr(found, part, None)
        return found

    return {key: value(after, key) for key in SETTABLE if value(before, key) != value(after, key)}
