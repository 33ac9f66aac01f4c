"""transformers.Trainer that writes our checkpoints, and goes on from one as if never stopped.

What the run will be is a function of its checkpoint alone: weights, optimizer, schedule, random
state, place in the data, early stopping's patience, best score, and the loss summed since the last
log. Overridden are the methods that would pickle, and the one that would take one step too many.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from sparsegrad_cli import distributed
from sparsegrad_cli.data.order import OrderHash
from sparsegrad_cli.errors import FileFormatError, InterruptedRunError
from sparsegrad_cli.interruption import set_activity
from sparsegrad_cli.io.atomic import read_tensors
from sparsegrad_cli.methods.implementation import load_by_name, trainable_names, trainable_state
from sparsegrad_cli.models.nan_check import check_weights
from sparsegrad_cli.run.checkpoint_manifest import damage
from sparsegrad_cli.run.checkpoints import (
    TRAINER_STATE,
    Shelf,
    best_of,
    evaluation_due,
    trainer_state,
)
from sparsegrad_cli.training import checkpoint_state as files
from sparsegrad_cli.training.resume_checks import check_measured

# What a run is made of, in the order asked: of other data a basis is another, too.
_ORIGINS = {
    "data": ("on other data", "the data"),
    "model": ("on another base model", "the model"),
    "basis": ("in another basis", "basis.safetensors"),
    "start": ("from another adapter", "what init_from names"),
}


@dataclass(frozen=True)
class Resumed:
    """What a checkpoint says beside transformers' own state.

    Attributes:
        folder: the checkpoint.
        best: the best checkpoint so far.
        stopped: training was ended there before its last step, by early stopping.
        steps: how many steps the run had in all when the checkpoint was written.
        loss: summed in this process since the step that was logged last, and that step.
        measured: times and memory up to there.
    """

    folder: Path
    best: Path | None
    stopped: bool
    steps: int
    loss: tuple[float, int]
    measured: dict[str, Any]


def stopped_early(state: Mapping[str, Any]) -> bool:
    """Return whether early stopping ended a run at a checkpoint, by its trainer_state.json.

    Raises:
        KeyError, TypeError: it does not say so.
    """
    callbacks = state["stateful_callbacks"]
    if not callbacks["TrainerControl"]["args"]["should_training_stop"]:
        return False
    if state["global_step"] < state["max_steps"]:
        return True
    stopping = callbacks.get("EarlyStoppingCallback")  # may have had its say in the last step
    if not stopping:
        return False
    waited = stopping["attributes"]["early_stopping_patience_counter"]
    return bool(waited >= stopping["args"]["early_stopping_patience"])


class CheckpointedTrainer(Trainer):
    """A Trainer with a shelf of checkpoints.

    Args:
        shelf: where they stand.
        order: the hash of what the model has met.
        origins: digests of what the run is made of, by the names of ``_ORIGINS``: the basis that
            the method was prepared with, the data, the model as it was loaded.
        kwargs: as transformers.Trainer.

    Attributes:
        resumed: the checkpoint that training went on from.
        measured: asked for times and memory, to be kept in every checkpoint.
    """

    def __init__(
        self, *, shelf: Shelf, order: OrderHash, origins: Mapping[str, str | None], **kwargs: Any
    ) -> None:
        self.optimizer: Any = None
        self.control: Any = None
        self.is_fsdp_enabled: bool = False
        self.is_deepspeed_enabled: bool = False
        self._tr_loss: torch.Tensor
        self.shelf, self.order, self._origins = shelf, order, dict(origins)
        self.resumed: Resumed | None = None
        self.measured: Callable[[], dict[str, Any]] = dict
        self._drawn: files.RandomState | None = None
        super().__init__(**kwargs)

    # --- writing

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write checkpoint-N whole or not at all, then drop what is over save_total_limit."""
        assert isinstance(self.model, nn.Module)
        step = self.state.global_step
        set_activity(f"writing checkpoint-{step}")
        check_weights(self.model, step)  # or the last good checkpoint would make room for a bad one
        if self.state.best_global_step:
            best = self.shelf.place(self.state.best_global_step)
            if best.exists() or self.state.best_global_step == step:
                self.state.best_model_checkpoint = str(best)
        self._export_callback_states()
        # Of processes that train together each draws its own numbers and sums its own losses.
        drawn = distributed.all_gather(files.random_state())
        losses = distributed.all_gather(float(self._tr_loss))
        # What is split over them is made whole by all.
        weights, whole = trainable_state(self.model), files.whole_state(self.optimizer)
        fill = partial(
            self._fill_checkpoint, drawn=drawn, losses=losses, weights=weights, whole=whole
        )
        # The first writes; the others wait, and where it cannot they do not wait for ever.
        self.shelf.newest = distributed.from_rank_zero(
            lambda: self.shelf.write(step, fill, self.best_checkpoint)
        )

    @property
    def best_checkpoint(self) -> Path | None:
        """The best one so far."""
        best = self.state.best_model_checkpoint
        return None if best is None else Path(best)

    def _export_callback_states(self) -> None:
        from transformers.trainer_callback import ExportableState

        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                self.state.stateful_callbacks[type(callback).__name__] = callback.state()

    def _fill_checkpoint(
        self,
        folder: Path,
        *,
        drawn: list[files.RandomState],
        losses: list[float],
        weights: dict[str, Tensor],
        whole: dict[str, Any],
    ) -> None:
        scaler = self.accelerator.scaler
        extras = {
            "order": self.order.state(),
            **self._origins,
            "loss": [losses, self._globalstep_last_logged],
            "scaler": None if scaler is None else scaler.state_dict(),
            "measured": self.measured(),
        }
        files.save_training_state(
            folder, weights, self.optimizer, self.lr_scheduler, extras, drawn, whole
        )
        self.state.save_to_json(str(folder / TRAINER_STATE))

    def save_now(self) -> Path:
        """A checkpoint of this very step (Ctrl-C), if there is none yet.

        Raises:
            InterruptedRunError: under DeepSpeed, which has no checkpoints.
        """
        assert isinstance(self.model, nn.Module)
        if self.is_deepspeed_enabled:
            raise InterruptedRunError(
                f"stopped after step {self.state.global_step}; DeepSpeed's state is not saved",
                fix="--overwrite begins anew",
            )
        folder = self.shelf.place(self.state.global_step)
        if folder != self.shelf.newest:
            self._save_checkpoint(self.model, None)
        return folder

    @contextmanager
    def stopped_evaluation_saved(self) -> Iterator[None]:
        """Save a checkpoint if the evaluation inside is stopped, so that --resume repeats it.

        The checkpoint's control says that the evaluation is due, and its random state is the one
        from before it. After training, the weights may be those of the best checkpoint: the one
        before stands.

        Raises:
            InterruptedRunError: says what was saved.
        """
        drawn = files.random_state()
        try:
            yield
        except InterruptedRunError as stopped:
            over = not self.is_in_train and self.args.load_best_model_at_end
            if self.state.global_step and not over:
                files.set_random_state(drawn)
                folder = self.save_now()
                stopped.what = (
                    f"stopped in the evaluation after step {self.state.global_step} of "
                    f"{self.state.max_steps}; {folder.name} is saved"
                )
                stopped.fix = "use --resume, which repeats that evaluation first"
            raise

    # --- reading

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        extras = files.load_state_json(folder)["extras"]
        state = trainer_state(folder)
        try:
            losses, logged = extras["loss"]
            self.resumed = Resumed(
                folder,
                best_of(folder),
                stopped_early(state),
                operator.index(state["max_steps"]),
                (float(losses[distributed.rank()]), operator.index(logged)),
                check_measured(extras["measured"]),
            )
            # Of data and model those are silent that were written before these were kept.
            origins = {n: extras[n] for n in _ORIGINS if n == "basis" or n in extras}
            self.order.load_state(extras["order"])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise FileFormatError(
                f"is incomplete: {error}", where=str(folder), fix="remove the damaged checkpoint"
            ) from error
        self._check_origins(folder, origins)
        self._load_weights(folder)

    def _check_origins(self, folder: Path, origins: Mapping[str, Any]) -> None:
        """Refuse to go on with what would be another run."""
        for name, digest in origins.items():
            words, lost = _ORIGINS[name]
            if digest != self._origins.get(name):
                raise FileFormatError(
                    f"{folder.name} was trained {words} than the run's is now",
                    where=str(folder),
                    fix=f"bring {lost} back from a copy; --overwrite begins anew",
                )

    def _load_weights(self, folder: Path) -> None:
        tensors = read_tensors(folder / files.TRAINABLE)
        assert isinstance(self.model, nn.Module)
        expected = trainable_names(self.model)
        try:
            if set(tensors) != expected:
                raise KeyError(sorted(set(tensors) ^ expected)[0])
            load_by_name(self.model, tensors)
        except KeyError as error:
            raise FileFormatError(
                f"the checkpoint does not fit this recipe: {error.args[0]}",
                where=str(folder),
                fix="resume with the recipe that the run was started with (recipe.yaml in it)",
            ) from None

    def go_on(self) -> None:
        """Once transformers has begun to train: what it resets, or looks for where it was."""
        if self.resumed is None:
            return
        best = self.resumed.best
        self.state.best_model_checkpoint = None if best is None else str(best)
        total, self._globalstep_last_logged = self.resumed.loss
        self._tr_loss = torch.full_like(self._tr_loss, total)
        if self.state.max_steps > self.resumed.steps:
            self.order.forget_last()
        if evaluation_due(self.resumed.folder):
            files.load_random(self.resumed.folder)
            self._maybe_log_save_evaluate(
                self._tr_loss, None, self.model_wrapped, None, 0.0, None, time.time()
            )
            self._drawn = files.random_state()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # transformers would take a step before it looks whether there is one left to take.
        over = self.state.global_step >= self.state.max_steps
        if self.resumed is not None and (
            over or self.resumed.stopped or self.control.should_training_stop
        ):
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _load_best_model(self) -> None:
        best = self.best_checkpoint
        assert best is not None
        wrong = damage(best)
        if wrong is not None:
            raise FileFormatError(
                f"{best.name}, the best one, has been damaged since: {wrong}",
                where=str(best),
                fix="--resume trains again from the checkpoint before",
            )
        self._load_weights(best)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            assert self.optimizer is not None
            files.load_optimizer(Path(checkpoint), self.optimizer, self.lr_scheduler)

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.accelerator.scaler is not None:
            kept = files.load_state_json(Path(checkpoint))["extras"].get("scaler")
            if kept:
                self.accelerator.scaler.load_state_dict(kept)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._drawn is not None:  # an evaluation has been made up for since
            files.set_random_state(self._drawn)
        elif checkpoint is not None:
            files.load_random(Path(checkpoint))
