"""Batches under a budget of memory: cut up only where nothing else helps."""

from __future__ import annotations

import math

from sparsegrad_cli.estimate.estimate_steps import changed
from sparsegrad_cli.recipe.load_recipe import LoadedRecipe
from sparsegrad_cli.study.budget.counting import Counting


def largest_batch(loaded: LoadedRecipe, counting: Counting, room: float) -> int | None:
    """The recipe's own batch, or the largest that divides it at which a step fits."""
    whole = loaded.recipe.train.per_device_train_batch_size
    batches = divisors(whole) if loaded.recipe.method.splits_batches else [whole]
    return next((b for b in batches if counting.step(at_batch(loaded, b)) <= room), None)


def divisors(number: int) -> list[int]:
    """All of them, the largest first."""
    small = [part for part in range(1, math.isqrt(number) + 1) if number % part == 0]
    return sorted({*small, *(number // part for part in small)}, reverse=True)


def at_batch(loaded: LoadedRecipe, batch: int) -> LoadedRecipe:
    """With a smaller batch and as many more of them accumulated; calibration keeps its own."""
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


def calibrated(loaded: LoadedRecipe, counting: Counting, room: float) -> LoadedRecipe | None:
    """With the largest batch of calibration that fits, and steps for as many examples."""
    return next((at for at in calibrations(loaded) if counting.calibration(at) <= room), None)


def calibrations(loaded: LoadedRecipe) -> list[LoadedRecipe]:
    """Its calibration at each batch that it may have, the recipe's own first."""
    section = loaded.recipe.calibration
    whole = section.batch_size or loaded.recipe.train.per_device_train_batch_size
    smaller: list[LoadedRecipe] = []
    for batch in divisors(whole)[1:]:
        steps = section.steps * whole // batch
        smaller.append(changed(loaded, "calibration", batch_size=batch, steps=steps))
    return [loaded, *smaller]
