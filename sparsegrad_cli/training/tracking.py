"""The experiment trackers of ``train.report_to``, as trackers of accelerate.

transformers has an integration for each of the names; accelerate has them for some. One adapter
lets accelerate log through transformers' integrations, so that names, tags and the places of files
are those of a Trainer run. recipe/trackers.py says in the environment where the files go.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, on_main_process
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import (
    DVCLiveCallback,
    TensorBoardCallback,
    get_reporting_integration_callbacks,
)

from sparsegrad_cli import distributed
from sparsegrad_cli.recipe.schema import Recipe
from sparsegrad_cli.recipe.trackers import named, project_of, run_name_of, write_ids

# The keys of ``train:`` that trackers record: those of TrainingArguments that are not given apart.
_RECORDED = {field.name for field in dataclasses.fields(TrainingArguments)} - {
    *("save_strategy", "save_steps", "save_total_limit", "report_to", "project", "run_name"),
}


def make_trackers(
    recipe: Recipe, run_dir: Path, model: nn.Module, note: Callable[[str], None]
) -> list[GeneralTracker]:
    """Make the trackers that a recipe names. Call it before the Accelerator is made.

    Args:
        recipe: The recipe.
        run_dir: The run's folder.
        model: Its configuration is recorded.
        note: Called with where the data goes that is not sent.
    """
    names = named(recipe.train.report_to)
    if not names:
        return []
    arguments = _arguments(recipe, run_dir, names)
    callbacks: list[type[TrainerCallback]] = get_reporting_integration_callbacks(list(names))
    trackers: list[GeneralTracker] = []
    for name, kind in zip(names, callbacks, strict=True):
        callback = kind()
        if isinstance(callback, DVCLiveCallback):  # The only one with no variable for its folder.
            from dvclive import Live  # type: ignore[import-not-found]

            callback.live = Live(dir=str(run_dir / "dvclive"))
        trackers.append(TransformersTracker(name, callback, arguments, model))
        if name == "wandb" and os.environ.get("WANDB_MODE") == "offline":
            place = run_dir / "wandb"
            note(f"wandb sends nothing: wandb sync {place}/offline-run-*, or WANDB_MODE=online")
    return trackers


@contextmanager
def tracked(accelerator: Accelerator, run_dir: Path, step: int | None) -> Iterator[None]:
    """Begin a run in all trackers of an Accelerator, and end it with the context.

    Args:
        accelerator: Holds the trackers.
        run_dir: The run's folder.
        step: The step of the checkpoint that the run resumes from; None for a new run.
    """
    for tracker in accelerator.log_with:
        if isinstance(tracker, TransformersTracker):
            tracker.begin(step)
    accelerator.init_trackers(run_dir.name)
    failed = True
    try:
        yield
        failed = False
    finally:
        for tracker in accelerator.trackers:
            if isinstance(tracker, TransformersTracker):
                tracker.end(failed=failed)


def _arguments(recipe: Recipe, run_dir: Path, names: tuple[str, ...]) -> TrainingArguments:
    """Return the settings of a run as its trackers record them."""
    settings = recipe.train.model_dump(include=_RECORDED)
    if not recipe.train.gradient_checkpointing:
        settings.pop("gradient_checkpointing")
    return TrainingArguments(
        output_dir=str(run_dir),
        run_name=run_name_of(run_dir, recipe.train),
        project=project_of(run_dir, recipe.train),
        seed=recipe.seed,
        report_to=list(names),
        **{**settings, "load_best_model_at_end": False},
    )


class TransformersTracker(GeneralTracker):
    """A tracker of accelerate that logs through an integration of transformers.

    Args:
        name: As in ``report_to``.
        callback: transformers' integration.
        arguments: Settings of the run.
        model: Its configuration is recorded.
    """

    requires_logging_directory = False

    def __init__(
        self, name: str, callback: TrainerCallback, arguments: TrainingArguments, model: nn.Module
    ) -> None:
        super().__init__(_blank=True)
        self.name = name
        self._callback, self._arguments, self._model = callback, arguments, model
        self._control = TrainerControl()
        self._state = TrainerState(
            is_local_process_zero=distributed.is_rank_zero(),
            is_world_process_zero=distributed.is_rank_zero(),
        )

    @property
    def tracker(self) -> TrainerCallback:
        """transformers' integration."""
        return self._callback

    @on_main_process
    def begin(self, step: int | None) -> None:
        """Prepare for a run that continues after a step, or is new (None)."""
        if step is None or not isinstance(self._callback, TensorBoardCallback):
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            from tensorboardX import SummaryWriter  # type: ignore[no-redef]

        # The killed process may have logged steps after the checkpoint: they are logged again.
        folder = self._callback.logging_dir
        self._callback.tb_writer = SummaryWriter(folder, purge_step=step + 1)

    @on_main_process
    def start(self) -> None:
        """Begin a run."""
        self._tell("on_init_end")
        self._tell("on_train_begin")
        folder = Path(self._arguments.output_dir)
        if self.name == "wandb":
            import wandb

            write_ids(folder, {"wandb": wandb.run.id})
        elif self.name == "mlflow":
            import mlflow

            write_ids(folder, {"mlflow": mlflow.active_run().info.run_id})

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Log the values of a step; those of an evaluation begin with ``eval_``."""
        self._state.global_step = step or 0
        self._state.epoch = values.get("epoch")
        self._tell("on_log", logs=values)

    @on_main_process
    def end(self, *, failed: bool) -> None:
        """End the run, and leave the tracker ready for another run of this process."""
        if self.name == "mlflow":
            import mlflow

            mlflow.flush_async_logging()  # Ending the run does not wait for the last values.
            if failed:
                mlflow.end_run("FAILED")
        self._tell("on_train_end")
        if self.name == "wandb":
            import wandb

            wandb.finish(exit_code=int(failed))

    def _tell(self, event: str, **content: Any) -> None:
        handler = getattr(self._callback, event)
        with redirect_stdout(sys.stderr):  # Some print, and stdout is for the command's result.
            handler(self._arguments, self._state, self._control, model=self._model, **content)
