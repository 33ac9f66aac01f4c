"""Make batches smaller if no size of a method fits a memory budget otherwise."""

from __future__ import annotations

import math

from sparsegrad_cli.estimate.estimate_steps import changed
from sparsegrad_cli.recipe.load_recipe import LoadedRecipe
from sparsegrad_cli.study.budget.counting import Counting


def largest_batch(loaded: LoadedRecipe, counting: Counting, room: float) -> int | None:
    """Return the recipe's batch, or the largest divisor of it at which a step fits."""
    whole = loaded.recipe.train.per_device_train_batch_size
    batches = divisors(whole) if loaded.recipe.method.splits_batches else [whole]
    return next((b for b in batches if counting.step(at_batch(loaded, b)) <= room), None)


def divisors(number: int) -> list[int]:
    """Return all divisors, the largest first."""
    small = [part for part in range(1, math.isqrt(number) + 1) if number % part == 0]
    return sorted({*small, *(number // part for part in small)}, reverse=True)


def at_batch(loaded: LoadedRecipe, batch: int) -> LoadedRecipe:
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


def calibrated(loaded: LoadedRecipe, counting: Counting, room: float) -> LoadedRecipe | None:
    """Return the recipe with the largest calibration batch that fits; None if none does."""
    return next((at for at in calibrations(loaded) if counting.calibration(at) <= room), None)


def calibrations(loaded: LoadedRecipe) -> list[LoadedRecipe]:
    """Return the recipe at each calibration batch that divides its own, with steps to match."""
    section = loaded.recipe.calibration
    whole = section.batch_size or loaded.recipe.train.per_device_train_batch_size
    smaller: list[LoadedRecipe] = []
    for batch in divisors(whole)[1:]:
        steps = section.steps * whole // batch
        smaller.append(changed(loaded, "calibration", batch_size=batch, steps=steps))
    return [loaded, *smaller]
