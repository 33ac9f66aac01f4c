"""Count the memory of a recipe's step, optimizer and calibration in fake runs, each once."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from sparsegrad_cli.estimate.estimate_steps import (
    changed,
    check_countable,
    left_out,
    what_memory_depends_on,
)
from sparsegrad_cli.estimate.fake_model import bare_model, name_task
from sparsegrad_cli.estimate.fake_run import STEP, Conditions, FakeRun, Kernels
from sparsegrad_cli.estimate.fake_tensors import ShapesOnly
from sparsegrad_cli.methods.base import TargetShapes
from sparsegrad_cli.models.architectures import configuration_of
from sparsegrad_cli.models.targets import Target, find_targets
from sparsegrad_cli.recipe.load_recipe import LoadedRecipe, to_plain
from sparsegrad_cli.tasks.longest_batch import Longest, find_longest
from sparsegrad_cli.tasks.precision import check_precision

# These settings make bases of the right shapes cheaply; a step does not depend on their values.
_ANY_BASIS = {"source": "original", "decomposition": "exact", "score": "spectral", "basis": None}
_KEPT = 2  # fake runs that are kept for other batches


class Counting:
    """Count recipes in fake runs, and remember the results.

    Args:
        kernels: the device whose kernels save tensors for the backward pass.
    """

    def __init__(self, kernels: Kernels) -> None:
        self.fake_runs = 0
        self._kernels = kernels
        self._figures: dict[str, int] = {}
        self._ready: dict[str, FakeRun] = {}
        self._facts: dict[str, tuple[Any, Longest, list[str]]] = {}
        self._targets: dict[str, list[Target]] = {}

    def longest(self, loaded: LoadedRecipe) -> Longest:
        """Return the longest batch of the recipe's data."""
        return self._known(loaded)[1]

    def targets(self, loaded: LoadedRecipe) -> list[Target]:
        """Return the recipe's target modules, found in a model without weights."""
        plain = to_plain(loaded.recipe)
        key = json.dumps([plain["model"], plain["targets"], plain["task"]])
        if key not in self._targets:
            with ShapesOnly():
                model = bare_model(loaded, self._known(loaded)[0])
            where = loaded.where("targets")
            self._targets[key] = find_targets(model, loaded.recipe.targets, where)
        return self._targets[key]

    def shapes(self, loaded: LoadedRecipe) -> TargetShapes:
        """Return the shapes on which the size of the recipe's method depends."""
        return TargetShapes.of(loaded, self.targets(loaded))

    def step(self, loaded: LoadedRecipe) -> int:
        """Return the bytes at the peak of a training step on the longest batch."""
        longest = self.longest(loaded)
        size = longest.size(loaded.recipe.train.per_device_train_batch_size)
        padded = longest.padded(loaded.recipe.train.per_device_train_batch_size)

        def count() -> int:
            fake = self._fake_run(_plain_basis(loaded), padded)
            meter = fake.step(size, longest.width, longest.lengths[:size])
            return max(peak.peak_bytes for name in STEP if (peak := meter.peak(name)) is not None)

        return self._figure(f"step {size} {padded}", loaded, count)

    def state(self, loaded: LoadedRecipe) -> int:
        """Return the bytes of the full optimizer state."""

        def count() -> int:
            return self._fake_run(_plain_basis(loaded), True).state_bytes

        return self._figure("state", loaded, count)

    def calibration(self, loaded: LoadedRecipe) -> int:
        """Return the peak bytes of calibration on the longest batch; 0 without calibration."""
        method, longest = loaded.recipe.method, self.longest(loaded)
        if not method.calibrates or loaded.recipe.calibration.basis is not None:
            return 0
        section, train = loaded.recipe.calibration, loaded.recipe.train
        size = longest.size(section.batch_size or train.per_device_train_batch_size)

        def count() -> int:
            any_size = changed(loaded, "calibration", batch_size=None, steps=1)
            peak = self._fake_run(any_size, True).calibration(size)
            return 0 if peak is None else peak.peak_bytes

        return self._figure(f"calibration {size}", loaded, count)

    def evaluation(self, loaded: LoadedRecipe) -> int:
        """Return the bytes at the peak of evaluation at the width of the longest training batch."""
        size, width = loaded.recipe.train.per_device_eval_batch_size, self.longest(loaded).width

        def count() -> int:
            meter = self._fake_run(_plain_basis(loaded), True).evaluation(size, width)
            peak = meter.peak("evaluate")
            return 0 if peak is None else peak.peak_bytes

        return self._figure("evaluation", loaded, count)

    def notes(self, loaded: LoadedRecipe) -> list[str]:
        """Return what a fake run of the recipe assumes."""
        padded = self.longest(loaded).padded(loaded.recipe.train.per_device_train_batch_size)
        fake = self._fake_run(_plain_basis(loaded), padded)
        return [*self._known(loaded)[2], *fake.notes, *left_out(loaded.recipe)]

    # --- caches

    def _known(self, loaded: LoadedRecipe) -> tuple[Any, Longest, list[str]]:
        """Return the configuration for the task, the longest batch of the data, and notes."""
        recipe, train = loaded.recipe, loaded.recipe.train
        plain = to_plain(recipe)
        # The longest examples do not depend on how a step is split into batches.
        examples = train.gradient_accumulation_steps * train.per_device_train_batch_size
        key = json.dumps([plain["model"], plain["task"], examples])
        if key not in self._facts:
            config, _ = configuration_of(recipe.model)
            longest = find_longest(recipe, config, examples)
            self._facts[key] = config, longest, name_task(recipe, config, longest.spec)
        return self._facts[key]

    def _figure(self, what: str, loaded: LoadedRecipe, count: Callable[[], int]) -> int:
        check_countable(loaded.recipe)
        check_precision(loaded)
        accumulates = loaded.recipe.train.gradient_accumulation_steps > 1
        key = f"{what} {accumulates} {what_memory_depends_on(loaded.recipe)}"
        if key not in self._figures:
            self._figures[key] = count()
        return self._figures[key]

    def _fake_run(self, loaded: LoadedRecipe, padded: bool) -> FakeRun:
        """Return a fake run for any batch. Recipes that differ only in the batch share it."""
        config, longest, _ = self._known(loaded)
        fitted = changed(loaded, "task", max_length=longest.width)
        accumulates = fitted.recipe.train.gradient_accumulation_steps > 1
        same = changed(
            fitted,
            "train",
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2 if accumulates else 1,
        )
        key = f"{padded} {what_memory_depends_on(same.recipe)}"
        if key not in self._ready:
            self.fake_runs += 1
            conditions = Conditions(kernels=self._kernels, padded=padded)
            while len(self._ready) >= _KEPT:
                del self._ready[next(iter(self._ready))]
            self._ready[key] = FakeRun(same, config, conditions)
        return self._ready[key]


def _plain_basis(loaded: LoadedRecipe) -> LoadedRecipe:
    return changed(loaded, "calibration", **_ANY_BASIS)
