"""One method on one task under a budget of entries or bytes: its size, and where it must, its
batch.

The method's size is made as large as fits at the recipe's own batch. Only where not even the
smallest fits is the batch made smaller; gradients then accumulate over as many micro-batches, so
that the update is that of the recipe's batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sparsegrad_cli.recipe.budget import Budget
from sparsegrad_cli.recipe.load_recipe import LoadedRecipe
from sparsegrad_cli.recipe.method_section import MepropMethod, SparsegradMethod
from sparsegrad_cli.study.budget.batches import (
    at_batch,
    calibrated,
    calibrations,
    divisors,
    largest_batch,
    may_accumulate,
)
from sparsegrad_cli.study.budget.counting import Counting
from sparsegrad_cli.study.budget.search import largest, largest_in_levels
from sparsegrad_cli.study.budget.sizes import Knob, entries_of, knob_of, levels_of, size_words

_SLACK = 1e-3  # of the budget, that a number of entries may leave
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
ALL = "every entry of the targets trains"
FREE = "choosing more entries takes no more memory: as many as the recipe says"


@dataclass(frozen=True)
class Pick:
    """What a budget comes to for a method.

    Attributes:
        recipe: the method at its size, with its batch.
        size: that size in words.
        predicted: what it will take, in the budget's unit.
        limit: why no more of the budget could be spent, where no larger size would tell.
        larger: the next larger size in words, and what it would take.
        shape: [examples, tokens] that were counted, with ``shape_from`` in words.
        notes: what was supposed.
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
    """Not even the smallest fits.

    Args:
        takes: what the smallest takes.
        size: which that is, in words.
        fix: what to do beside allowing more.
    """

    def __init__(self, takes: float, size: str, fix: str) -> None:
        super().__init__(size)
        self.takes, self.size, self.fix = takes, size, fix


def solve(loaded: LoadedRecipe, budget: Budget, counting: Counting, *, own_size: bool) -> Pick:
    """The method's size, and where it must its batch, under a budget of entries or bytes.

    Args:
        own_size: the study names the method's size: it is kept.

    Raises:
        UnreachableError: the smallest does not fit.
        SparsegradError: the recipe cannot be counted.
    """
    targets = counting.targets(loaded)
    knob = None if own_size else knob_of(loaded, targets)
    why = OWN if own_size else ALL
    if knob is not None and budget.in_bytes and not knob.costs_memory:
        knob, why = None, FREE
    if budget.kind == "trainable":
        return _entries(loaded, budget, counting, knob, why)
    if budget.kind == "optimizer_state":
        return _state(loaded, budget, counting, knob, why)
    return _peak(loaded, budget, counting, knob, why)


def _entries(
    loaded: LoadedRecipe, budget: Budget, counting: Counting, knob: Knob | None, why: str
) -> Pick:
    targets = counting.targets(loaded)
    found = _sized(loaded, knob, why, budget.amount, lambda at: entries_of(at, targets), counting)
    if found is None:
        least = _least(loaded, knob)
        raise UnreachableError(entries_of(least, targets), size_words(least, targets), "")
    taken = entries_of(found.recipe, targets)
    return Pick(found.recipe, size_words(found.recipe, targets), taken, found.limit, found.larger)


def _state(
    loaded: LoadedRecipe, budget: Budget, counting: Counting, knob: Knob | None, why: str
) -> Pick:
    targets = counting.targets(loaded)
    found = _sized(loaded, knob, why, budget.amount, counting.state, counting)
    if found is None:
        least = _least(loaded, knob)
        method = loaded.recipe.method
        unbounded = isinstance(method, MepropMethod | SparsegradMethod) and why == FREE
        fix = "bound it by method.state_capacity" if unbounded else ""
        if loaded.recipe.scope == "rest":
            fix = "scope: head, where the rest of the model keeps none"
        raise UnreachableError(counting.state(least), size_words(least, targets), fix)
    recipe, notes = found.recipe, counting.notes(found.recipe)
    size, taken = size_words(recipe, targets), counting.state(recipe)
    return Pick(recipe, size, taken, found.limit, found.larger, notes=notes)


def _peak(
    loaded: LoadedRecipe, budget: Budget, counting: Counting, knob: Knob | None, why: str
) -> Pick:
    targets, room = counting.targets(loaded), budget.amount
    batch = largest_batch(_least(loaded, knob), counting, room)
    if batch is None:
        batch = 1 if may_accumulate(loaded) else loaded.recipe.train.per_device_train_batch_size
        least = at_batch(_least(loaded, knob), batch)
        raise _too_much(least, counting)
    cut, slack = at_batch(loaded, batch), _SLACK * room
    found = _sized(cut, knob, why, room, counting.step, counting, slack)
    assert found is not None  # the least fits at this batch
    fitted = calibrated(found.recipe, counting, room)
    if fitted is None:  # bases and their making take what the step could spend

        def whole(at: LoadedRecipe) -> float:
            return max(counting.step(at), counting.calibration(calibrations(at)[-1]))

        found = _sized(cut, knob, why, room, whole, counting, slack)
        fitted = None if found is None else calibrated(found.recipe, counting, room)
        if found is None or fitted is None:
            raise _too_much(_least(cut, knob), counting)
    longest = counting.longest(fitted)
    taken = max(counting.step(fitted), counting.calibration(fitted))
    shape = [longest.size(batch), longest.width]
    notes = counting.notes(fitted)
    if counting.evaluation(fitted) > room:
        notes.append("an evaluation needs more: a smaller train.per_device_eval_batch_size")
    larger = found.larger or _larger_batch(loaded, knob, batch, counting)
    size = size_words(fitted, targets)
    return Pick(fitted, size, taken, found.limit, larger, shape, longest.source, notes)


def _too_much(least: LoadedRecipe, counting: Counting) -> UnreachableError:
    """What a step of the smallest takes, or its calibration where that is more."""
    size, width = size_words(least, counting.targets(least)), counting.longest(least).width
    step = counting.step(least)
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


def _least(loaded: LoadedRecipe, knob: Knob | None) -> LoadedRecipe:
    return loaded if knob is None else knob.at(loaded, knob.least)


@dataclass(frozen=True)
class _Sized:
    """The recipe at the largest size, and what stops it there; see :class:`Pick`."""

    recipe: LoadedRecipe
    limit: str = ""
    larger: tuple[str, float] | None = None


def _sized(
    loaded: LoadedRecipe,
    knob: Knob | None,
    why: str,
    room: float,
    figure: Callable[[LoadedRecipe], float],
    counting: Counting,
    slack: float = 0.0,
) -> _Sized | None:
    """The largest size within ``room``; None if none is."""
    if knob is None:
        return _Sized(loaded, why) if figure(loaded) <= room else None
    targets = counting.targets(loaded)

    def at(size: int) -> float:
        return figure(knob.at(loaded, size))

    levels = levels_of(knob, loaded, targets)
    if levels is None:
        size = largest(at, room, knob.least, knob.most, slack if knob.key == "entries" else 0.0)
    else:
        size = largest_in_levels(at, room, len(levels), levels.start, knob.most, slack)
    if size is None:
        return None
    recipe = knob.at(loaded, size)
    if size == knob.most:
        return _Sized(recipe, knob.top)
    more = knob.at(loaded, size + 1)
    if knob.key == "entries" and not (levels and levels.parts(size)):
        return _Sized(recipe)  # one entry more is no news
    return _Sized(recipe, larger=(size_words(more, targets), figure(more)))


def _larger_batch(
    loaded: LoadedRecipe, knob: Knob | None, batch: int, counting: Counting
) -> tuple[str, float] | None:
    """What the next larger batch would take; None at the recipe's own."""
    larger = [b for b in divisors(loaded.recipe.train.per_device_train_batch_size) if b > batch]
    if not larger:
        return None
    words = f"a batch of {larger[-1]}" + ("" if knob is None else ", at the smallest size,")
    return words, counting.step(at_batch(_least(loaded, knob), larger[-1]))


def settings_of(before: LoadedRecipe, after: LoadedRecipe) -> dict[str, Any]:
    """What a pick has set: dotted recipe key (of ``SETTABLE``) -> value, as an override says it."""

    def value(loaded: LoadedRecipe, key: str) -> Any:
        found: Any = loaded.recipe
        for part in key.split("."):
            found = getattr(found, part, None)
        return found

    return {key: value(after, key) for key in SETTABLE if value(before, key) != value(after, key)}
