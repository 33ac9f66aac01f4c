"""From timed steps to a number of steps: the arithmetic, and a real recipe timed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from little import base_folder, data_folder

from sparsegrad_cli.budget.solve import UnreachableError, settings_of
from sparsegrad_cli.budget.stopwatch import START, Stopwatch, fit_line, steps_within, unending
from sparsegrad_cli.budget.timing import as_timed, solve_seconds
from sparsegrad_cli.errors import SparsegradError
from sparsegrad_cli.observer import Observer
from sparsegrad_cli.recipe.loading import LoadedRecipe, load_recipe
from sparsegrad_cli.rundir import RunRecord, open_run_dir


def test_a_line_is_found_again() -> None:
    positions = [100, 300, 200, 900, 400]
    a, b = fit_line(positions, [0.25 + 0.001 * p for p in positions])
    assert a == pytest.approx(0.25) and b == pytest.approx(0.001)


@pytest.mark.parametrize(
    ("positions", "seconds", "line"),
    [
        ([64] * 3, [1.0, 2.0, 3.0], (2.0, 0.0)),  # nothing to tell apart
        ([1, 2, 3], [3.0, 2.0, 1.0], (2.0, 0.0)),  # more was quicker: noise
        ([10, 30], [1.0, 5.0], (0.0, 0.15)),  # through the origin, and the mean
    ],
)
def test_a_line_is_never_below_zero(
    positions: list[int], seconds: list[float], line: tuple[float, float]
) -> None:
    assert fit_line(positions, seconds) == pytest.approx(line)


@pytest.mark.parametrize("seed", range(20))
def test_steps_are_counted_along_the_batches_of_the_run(seed: int) -> None:
    draw = random.Random(seed)
    epoch = [draw.randrange(1, 50) for _ in range(draw.randrange(1, 12))]
    a, b = draw.choice([0.0, 1.0]), 0.5
    for seconds in (0.0, 0.4, draw.uniform(1, 40), draw.uniform(100, 3_000)):
        count, spent = START, 0.0  # one by one
        while spent + a + b * epoch[count % len(epoch)] <= seconds:
            spent += a + b * epoch[count % len(epoch)]
            count += 1
        steps, taken = steps_within(seconds, epoch, a, b)
        assert steps == count and taken == pytest.approx(spent)


def test_less_than_nothing_has_no_steps() -> None:
    assert steps_within(-0.1, [5, 6], 1.0, 0.0) == (0, 0.0)


# --- a recipe


def recipe(folder: Path, *overrides: str) -> LoadedRecipe:
    base_folder(folder / "base", num_hidden_layers=1)
    settings = (
        f"model={folder / 'base'}",
        "task=csv",
        f"task.path={data_folder(folder / 'data')}",
        "task.max_length=16",
        "train.per_device_train_batch_size=8",
        "train.use_cpu=true",
        "calibration.steps=2",
        "calibration.warmup_steps=1",
    )
    return load_recipe(None, (*settings, *overrides, f"output_dir={folder / 'run'}"))


def timed(loaded: LoadedRecipe, seconds: float) -> dict[str, Any]:
    folder = Path(loaded.recipe.output_dir or "")
    open_run_dir(folder, loaded.recipe, resume=False, overwrite=False)
    kept = RunRecord(folder, {"recipe_digest": ""})
    return Stopwatch(unending(loaded), kept, Observer(), resume=False).timed(seconds)


def test_a_recipe_is_timed_as_it_will_run(tmp_path: Path) -> None:
    loaded = recipe(tmp_path, "train.early_stopping_patience=1")
    found = timed(loaded, 20.0)
    assert found["calibrate_s"] > 0 and found["start_s"] > 0 and found["step_s"] > 0
    assert 3 <= found["timed_steps"] <= 200
    left = 20 - found["calibrate_s"] - found["start_s"]
    assert (found["steps"] > START) == (left > 0)
    assert found["predicted"] <= 20 + 1e-6
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    pick = as_timed(loaded, found)
    assert settings_of(loaded, pick.recipe) == {"train.max_steps": found["steps"]}
    assert pick.predicted == found["predicted"] and pick.timed is not None
    assert "predicted" not in pick.timed


def test_too_little_time_is_said_with_what_it_takes(tmp_path: Path) -> None:
    loaded = recipe(tmp_path)
    with pytest.raises(UnreachableError) as caught:
        as_timed(loaded, timed(loaded, 1e-3))
    assert caught.value.takes > 1e-3 and "first two steps" in caught.value.size


def test_a_recipe_that_does_not_run_says_why_from_its_own_process(tmp_path: Path) -> None:
    with pytest.raises(SparsegradError, match="block") as failed:
        solve_seconds(recipe(tmp_path, "targets.blocks='7:'"), 60, 1)
    assert failed.value.where is not None
