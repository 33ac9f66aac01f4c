"""How many steps a number of seconds has: a recipe's first steps, timed, in a process of its own.

Seconds cannot be counted without running. So the recipe itself runs, calibration and trainer and
all, for a few steps; what a step takes is put down to the positions (tokens and padding) that it
reads, seconds = a + b x positions by least squares, and the steps are then counted along the very
batches that the run will meet. ``python -m sparsegrad_cli.budget.stopwatch RECIPE SECONDS RESULT``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from sparsegrad_cli.errors import SparsegradError
from sparsegrad_cli.estimate.session import changed
from sparsegrad_cli.known_errors import known_errors
from sparsegrad_cli.methods.table import make_method
from sparsegrad_cli.observer import Observer
from sparsegrad_cli.recipe.loading import LoadedRecipe, load_recipe
from sparsegrad_cli.report.records import write_json_atomic
from sparsegrad_cli.rundir import RunRecord, open_run_dir
from sparsegrad_cli.training.fine_tuning import TrainingSession
from sparsegrad_cli.training.loop import TrainingLoop
from sparsegrad_cli.training.trainer import SparsegradTrainer

START = 2  # steps that are not like the others: memory is allocated, then measured
_FEWEST, _MOST = 8, 200  # steps to time
_SHARE = 1 / 20  # of the seconds asked for; then the fewest are enough
_UNENDING = 1_000_000


class _Clock(TrainerCallback):
    """Notes when each step ended, and stops when enough are timed."""

    def __init__(self, seconds: float) -> None:
        self._enough = min(60.0, _SHARE * seconds)
        self.trainer: SparsegradTrainer | None = None
        self.ends: list[float] = []
        self.positions: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The last callback of a step: what the others do belongs to it."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        assert self.trainer is not None
        self.positions.append(self.trainer.order.positions)
        timed = len(self.ends) - START
        if timed < 1:
            return
        spent = self.ends[-1] - self.ends[START - 1]
        slow = timed >= 3 and spent > 2 * self._enough
        if slow or timed >= _MOST or (timed >= _FEWEST and spent > self._enough):
            control.should_training_stop = True


class Stopwatch(TrainingSession):
    """A run up to the steps that are timed; nothing of it is kept."""

    def timed(self, seconds: float) -> dict[str, Any]:
        """The steps that ``seconds`` have, with what was measured to know it."""
        began = time.perf_counter()
        setup = self.load()
        method = make_method(self.method)
        prepared = self._prepared(setup, method)
        trainer = TrainingLoop(self, setup, method, prepared, resume=False).trainer
        clock = _Clock(seconds)
        clock.trainer = trainer
        trainer.add_callback(clock)
        torch.manual_seed(self.recipe.seed)
        started = time.perf_counter()
        trainer.train()
        if len(clock.ends) <= START:
            raise SparsegradError("training ended before a step could be timed", where="train")
        calibrate = self.seconds.get("calibrate_s", 0.0)
        start = clock.ends[START - 1] - started
        line = fit_line(_differences(clock.positions), _differences(clock.ends))
        ahead = positions_of(trainer)
        steps, predicted = steps_within(seconds - calibrate - start, ahead, *line)
        return {
            "steps": steps,
            "predicted": calibrate + start + predicted,
            "calibrate_s": calibrate,
            "start_s": start,
            "step_s": line[0] + line[1] * sum(ahead) / len(ahead),
            "timed_steps": len(clock.ends) - START,
            "wall_s": time.perf_counter() - began,
        }


def _differences(values: Sequence[float]) -> list[float]:
    """Of the steps that are timed: each less the one before it."""
    return [b - a for a, b in zip(values[START - 1 :], values[START:], strict=False)]


def fit_line(positions: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """(a, b) of seconds = a + b x positions, least squares, neither below zero.

    Where all positions are equal, or the slope comes out negative, a is the mean.
    """
    count = len(seconds)
    x, y = sum(positions) / count, sum(seconds) / count
    spread = sum((p - x) ** 2 for p in positions)
    along = sum((p - x) * (s - y) for p, s in zip(positions, seconds, strict=True))
    slope = along / spread if spread else 0.0
    if slope <= 0:
        return y, 0.0
    if slope * x > y:  # through the origin
        return 0.0, y / x
    return y - slope * x, slope


def positions_of(trainer: SparsegradTrainer) -> list[int]:
    """Positions of every optimizer step of the first epoch, in the run's own order."""
    data, args = trainer.train_dataset, trainer.args
    lengths = [len(ids) for ids in data["input_ids"]]
    order = list(trainer._get_train_sampler())
    size, parts = args.train_batch_size, args.gradient_accumulation_steps
    batches = [order[at : at + size] for at in range(0, len(order), size)]
    widths = [len(batch) * max(lengths[row] for row in batch) for batch in batches]
    return [sum(widths[at : at + parts]) for at in range(0, len(widths), parts)]


def steps_within(seconds: float, positions: Sequence[int], a: float, b: float) -> tuple[int, float]:
    """Steps that end within ``seconds``, after the first ``START``, which are paid for.

    Args:
        positions: of an epoch's steps; later epochs are taken to be alike.
        a, b: of :func:`fit_line`.

    Returns:
        (steps with the first ones, seconds of the others); 0 steps if even the first are too much.
    """
    if seconds < 0:
        return 0, 0.0
    epoch = [a + b * count for count in positions]
    rounds = int(seconds // sum(epoch))
    spent, at = rounds * sum(epoch), START + rounds * len(epoch)
    while spent + epoch[at % len(epoch)] <= seconds:
        spent += epoch[at % len(epoch)]
        at += 1
    return at, spent


def unending(loaded: LoadedRecipe) -> LoadedRecipe:
    """The recipe without evaluations, checkpoints and end: what is timed is its steps."""
    return changed(
        loaded,
        "train",
        max_steps=_UNENDING,
        eval_strategy="no",
        save_strategy="no",
        early_stopping_patience=None,
    )


def main(recipe: str, seconds: str, result: str) -> int:
    """Time a recipe; what was found, or what went wrong, is in the file ``result``."""
    loaded = load_recipe(recipe)
    folder = Path(loaded.recipe.output_dir or "")
    open_run_dir(folder, loaded.recipe, resume=False, overwrite=False)
    record = RunRecord(folder, {"command": "train", "name": folder.name, "recipe_digest": ""})
    try:
        watch = Stopwatch(unending(loaded), record, Observer(), resume=False)
        with known_errors(), watch.explained():
            found: dict[str, Any] = watch.timed(float(seconds))
    except SparsegradError as error:
        problem = {"what": error.what, "where": error.where, "fix": error.fix}
        write_json_atomic(result, {"error": problem})
        return error.exit_code
    write_json_atomic(result, found)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
