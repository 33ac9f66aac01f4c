"""Solve one method on one task under a budget of parameters or bytes, for its size and batch.

The solver takes the largest size that fits at the recipe's own batch. It makes the batch smaller
only if not even the smallest size fits. Gradients then accumulate over enough micro-batches that
the update is that of the recipe's batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from sparsegrad_cli.estimate.estimate_steps import changed
from sparsegrad_cli.estimate.largest_size import largest, largest_in_levels
from sparsegrad_cli.methods.base import SizeRange, Sizing
from sparsegrad_cli.methods.registry import SIZE_KEYS
from sparsegrad_cli.recipe.budget import Budget
from sparsegrad_cli.recipe.load_recipe import LoadedRecipe
from sparsegrad_cli.study.budget.counting import Counting

_SLACK = 1e-3  # share of a byte budget that a number of parameters may leave unused
SETTABLE = (
    "match",
    *(f"method.{key}" for key in sorted(SIZE_KEYS)),
    "train.per_device_train_batch_size",
    "train.gradient_accumulation_steps",
    "calibration.batch_size",
    "calibration.steps",
)
OWN = "the study sets its size"
ALL = "every parameter of the target modules trains"
BY_MEMORY = "optimizer_state=SIZE or peak=SIZE, which can size it: all of its weights train"
FREE = "a larger number of parameters takes no more memory, so the recipe's number is kept"


@dataclass(frozen=True)
class Pick:
    """The size and batch of a method under a budget.

    Attributes:
        recipe: the recipe with the method's size and the batch.
        size: the size in words.
        predicted: the expected amount, in the budget's unit.
        limit: why the rest of the budget stays unused, if ``larger`` does not explain it.
        larger: the next larger size in words, and the amount that it would take.
        shape: [examples, tokens] of the batch that was counted.
        shape_from: where the shape comes from, in words.
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
        takes: amount that the smallest size takes.
        size: the smallest size in words.
        fix: what to do other than allow more.
    """

    def __init__(self, takes: float, size: str, fix: str) -> None:
        super().__init__(size)
        self.takes, self.size, self.fix = takes, size, fix


def solve(loaded: LoadedRecipe, budget: Budget, counting: Counting, *, own_size: bool) -> Pick:
    """Return the method's size under a budget, with a smaller batch if necessary.

    Args:
        loaded: the recipe.
        budget: the budget.
        counting: counts recipes in fake runs.
        own_size: whether the study names the method's size, which is then kept.

    Raises:
        UnreachableError: the smallest size does not fit.
        SparsegradError: the recipe cannot be counted.
    """
    sizes = None if own_size else loaded.recipe.method.size_range(counting.shapes(loaded))
    fixed = OWN if own_size else ALL
    advice = ""
    if sizes is not None and budget.in_bytes and not sizes.costs_memory:
        advice, fixed, sizes = sizes.advice, FREE, None
    if sizes is not None and budget.kind == "trainable" and sizes.trains_all:
        advice, sizes = BY_MEMORY, None
    question = _Question(loaded, counting, budget.amount, sizes, fixed)
    if budget.kind == "trainable":
        return _trainable(question, advice)
    if budget.kind == "optimizer_state":
        return _optimizer_state(question, advice)
    return _peak(question)


def at_size(loaded: LoadedRecipe, size: int) -> LoadedRecipe:
    """Return the recipe with its method at the given size."""
    method = loaded.recipe.method.with_size(size)
    recipe = loaded.recipe.model_copy(update={"method": method, "match": None})
    return replace(loaded, recipe=recipe)


Figure = Callable[[LoadedRecipe], float]


@dataclass(frozen=True)
class _Sized:
    """The recipe at the largest size, and why it is not larger; see :class:`Pick`."""

    recipe: LoadedRecipe
    limit: str = ""
    larger: tuple[str, float] | None = None


@dataclass(frozen=True)
class _Question:
    """A recipe and the limit that its figure must stay within.

    Attributes:
        loaded: the recipe.
        counting: counts recipes in fake runs.
        room: the limit.
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
            figure: returns the amount that a recipe takes.
            slack: part of the limit that may stay unused if sizes are fine-grained.
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
            return _Sized(recipe)  # one more parameter is too little to report
        more = self.at(size + 1)
        return _Sized(recipe, larger=(self.text(more), figure(more)))


def _trainable(question: _Question, advice: str) -> Pick:
    def count(loaded: LoadedRecipe) -> float:
        return question.sizing(loaded).trainable

    found = question.solved(count)
    if found is None:
        raise UnreachableError(count(question.least), question.text(question.least), advice)
    text = question.text(found.recipe)
    return Pick(found.recipe, text, count(found.recipe), found.limit, found.larger)


def _optimizer_state(question: _Question, advice: str) -> Pick:
    counting = question.counting
    found = question.solved(counting.state)
    if found is None:
        least, fix = question.least, advice
        if least.recipe.scope == "rest":
            fix = "scope: head, so that the rest of the model needs no optimizer state"
        raise UnreachableError(counting.state(least), question.text(least), fix)
    recipe, notes = found.recipe, counting.notes(found.recipe)
    taken = counting.state(recipe)
    return Pick(recipe, question.text(recipe), taken, found.limit, found.larger, notes=notes)


def _peak(question: _Question) -> Pick:
    loaded, counting, room = question.loaded, question.counting, question.room
    batch = _largest_batch(question.least, counting, room)
    if batch is None:
        smallest = 1
        if not loaded.recipe.method.splits_batches:
            smallest = loaded.recipe.train.per_device_train_batch_size
        raise _too_much(question, _at_batch(question.least, smallest))
    cut, slack = replace(question, loaded=_at_batch(loaded, batch)), _SLACK * room
    found = cut.solved(counting.step, slack)
    assert found is not None  # the smallest size fits at this batch
    fitted = _calibrated(found.recipe, counting, room)
    if fitted is None:  # calibration with these bases does not fit

        def whole(at: LoadedRecipe) -> float:
            return max(counting.step(at), counting.calibration(_calibrations(at)[-1]))

        found = cut.solved(whole, slack)
        fitted = None if found is None else _calibrated(found.recipe, counting, room)
        if found is None or fitted is None:
            raise _too_much(cut, cut.least)
    longest, notes = counting.longest(fitted), counting.notes(fitted)
    if counting.evaluation(fitted) > room:
        what = "evaluation takes more than the budget"
        notes.append(f"{what}: set a smaller train.per_device_eval_batch_size")
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
    """Return the error for the smallest size, with the larger of its step and calibration."""
    counting, size = question.counting, question.text(least)
    step, width = counting.step(least), counting.longest(least).width
    making = counting.calibration(_calibrations(least)[-1])
    if making > step:
        advice = ["calibration.basis: a basis that `sparsegrad calibrate` made with more memory"]
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
    """Return the next larger batch and its bytes; None if the batch is the recipe's own."""
    whole = question.loaded.recipe.train.per_device_train_batch_size
    larger = [b for b in _divisors(whole) if b > batch]
    if not larger:
        return None
    text = f"a batch of {larger[-1]}" + (
        "" if question.sizes is None else ", at the smallest size,"
    )
    return text, question.counting.step(_at_batch(question.least, larger[-1]))


def settings_of(before: LoadedRecipe, after: LoadedRecipe) -> dict[str, Any]:
    """Return the keys of :data:`SETTABLE` that a pick has changed, with their values."""

    def value(loaded: LoadedRecipe, key: str) -> Any:
        found: Any = loaded.recipe
        for part in key.split("."):
            found = getattr(found, part, None)
        return found

    return {key: value(after, key) for key in SETTABLE if value(before, key) != value(after, key)}


# --- smaller batches


def _largest_batch(loaded: LoadedRecipe, counting: Counting, room: float) -> int | None:
    """Return the recipe's batch, or the largest divisor of it at which a step fits."""
    whole = loaded.recipe.train.per_device_train_batch_size
    batches = _divisors(whole) if loaded.recipe.method.splits_batches else [whole]
    return next((b for b in batches if counting.step(_at_batch(loaded, b)) <= room), None)


def _divisors(number: int) -> list[int]:
    """Return all divisors, the largest first."""
    small = [part for part in range(1, math.isqrt(number) + 1) if number % part == 0]
    return sorted({*small, *(number // part for part in small)}, reverse=True)


def _at_batch(loaded: LoadedRecipe, batch: int) -> LoadedRecipe:
    """Return the recipe with a smaller batch and more accumulation; calibration keeps its batch."""
    train, section = loaded.recipe.train, loaded.recipe.calibration
    whole = train.per_device_train_batch_size
    if batch == whole:
        return loaded
    steps = train.gradient_accumulation_steps * whole // batch
    smaller = changed(
        loaded, "train", per_device_train_batch_size=batch, gradient_accumulation_steps=steps
    )
    if not loaded.recipe.method.calibrates:
        return smaller
    return changed(smaller, "calibration", batch_size=section.batch_size or whole)


def _calibrated(loaded: LoadedRecipe, counting: Counting, room: float) -> LoadedRecipe | None:
    """Return the recipe with the largest calibration batch that fits; None if none does."""
    return next((at for at in _calibrations(loaded) if counting.calibration(at) <= room), None)


def _calibrations(loaded: LoadedRecipe) -> list[LoadedRecipe]:
    """Return the recipe at each calibration batch that divides its own, with steps to match."""
    section = loaded.recipe.calibration
    whole = section.batch_size or loaded.recipe.train.per_device_train_batch_size
    smaller: list[LoadedRecipe] = []
    for batch in _divisors(whole)[1:]:
        steps = section.steps * whole // batch
        smaller.append(changed(loaded, "calibration", batch_size=batch, steps=steps))
    return [loaded, *smaller]
