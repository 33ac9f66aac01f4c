"""The experiment trackers of ``train.report_to``, as trackers of accelerate.

transformers has an integration for each of the names; accelerate has them for some. One adapter
lets accelerate log through transformers' integrations, so that names, tags and the places of files
are those of a Trainer run. recipe/trackers.py says in the environment where the files go.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, on_main_process
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import DVCLiveCallback, get_reporting_integration_callbacks

from sparsegrad_cli import distributed
from sparsegrad_cli.recipe.schema import Recipe
from sparsegrad_cli.recipe.trackers import PROJECT, named, study_of

# Keys of ``train:`` that are not TrainingArguments'.
_OWN = {
    *("early_stopping_patience", "save_strategy", "save_steps", "save_total_limit", "report_to"),
    *("head_learning_rate", "lora_plus_ratio"),
    *("sample_prompts", "sample_max_new_tokens", "sample_temperature"),
}


def make_trackers(recipe: Recipe, run_dir: Path, model: nn.Module) -> list[GeneralTracker]:
    """Make the trackers that a recipe names. Call it before the Accelerator is made."""
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
    return trackers


def _arguments(recipe: Recipe, run_dir: Path, names: tuple[str, ...]) -> TrainingArguments:
    """Return the settings of a run as its trackers record them."""
    settings = recipe.train.model_dump(exclude=_OWN)
    if not recipe.train.gradient_checkpointing:
        settings.pop("gradient_checkpointing")
    return TrainingArguments(
        output_dir=str(run_dir),
        run_name=run_dir.absolute().name,
        project=(study_of(run_dir) or Path(PROJECT)).name,
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
    def start(self) -> None:
        """Begin a run."""
        self._tell("on_init_end")
        self._tell("on_train_begin")

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Log the values of a step; those of an evaluation begin with ``eval_``."""
        self._state.global_step = step or 0
        self._state.epoch = values.get("epoch")
        self._tell("on_log", logs=values)

    @on_main_process
    def finish(self) -> None:
        """End the run."""
        self._tell("on_train_end")

    def _tell(self, event: str, **content: Any) -> None:
        handler = getattr(self._callback, event)
        handler(self._arguments, self._state, self._control, model=self._model, **content)
