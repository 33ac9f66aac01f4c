"""What happens beside the training loop: records, progress, the memory probe, Ctrl-C."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from sparsegrad_cli import distributed, interruption
from sparsegrad_cli.errors import DiskError, InterruptedRunError
from sparsegrad_cli.progress import Observer
from sparsegrad_cli.records.environment import rss_bytes
from sparsegrad_cli.records.store import write_text_atomic
from sparsegrad_cli.training.step_timer import StepTimer
from sparsegrad_cli.training.trainer import SparsegradTrainer


class RecordCallback(TrainerCallback):
    """Times steps, writes steps.jsonl, keeps the history, tells the observer.

    Args:
        run_dir: where steps.jsonl is.
        observer: is told of steps and evaluations.
        history: evaluations so far, appended to.
        device: the run's; CUDA is waited for before the clock is read.
    """

    def __init__(
        self,
        run_dir: Path,
        observer: Observer,
        history: list[dict[str, Any]],
        device: str = "cpu",
    ) -> None:
        self.timer = StepTimer(device)
        self.history = history
        self.train_log: list[dict[str, Any]] = []
        self.trainer: SparsegradTrainer | None = None
        self._path = run_dir / "steps.jsonl"
        self._observer = observer

    def cut(self, step: int | None, *, evaluated: bool = True) -> None:
        """Drop what a run logged after the checkpoint it resumes from; None drops everything.

        Args:
            step: the checkpoint's.
            evaluated: False where the evaluation of that step is to be made again.
        """
        if step is None and distributed.is_rank_zero():
            self._path.unlink(missing_ok=True)
        if step is None or not self._path.is_file():
            return
        lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = [r for r in map(_parse, lines) if r is not None and r["step"] <= step]
        if not evaluated:
            kept = [r for r in kept if "eval" not in r or r["step"] < step]
        distributed.barrier()  # all have read it
        if distributed.is_rank_zero():
            write_text_atomic(self._path, "".join(json.dumps(r) + "\n" for r in kept))
        self.history[:] = [r["eval"] for r in kept if "eval" in r]
        self.train_log = [
            {k: r[k] for k in ("step", "epoch", "loss", "learning_rate")}
            for r in kept
            if "loss" in r
        ]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on where the checkpoint was."""
        assert self.trainer is not None
        self.trainer.go_on()
        if self.trainer.resumed is not None:
            self.timer.durations[:0] = self.trainer.resumed.measured.get("steps_s", [])
        self._observer.total_steps("train", state.max_steps)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock of a step."""
        self.timer.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop it; evaluation and saving come after and are not part of a step."""
        self.timer.stop()
        assert self.trainer is not None
        self.trainer.order.mark(state.global_step, last=state.global_step >= state.max_steps)
        rate = self.timer.recent_steps_per_s()
        self._observer.step("train", {"step": state.global_step, "steps_per_s": rate})

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """One line in steps.jsonl per logged loss."""
        if not logs or "loss" not in logs:
            return
        record = {
            "step": state.global_step,
            "epoch": round(float(state.epoch or 0), 4),
            "loss": float(logs["loss"]),
            "learning_rate": float(logs["learning_rate"]),
        }
        self.train_log.append(record)
        line = record | {
            "steps_per_s": self.timer.recent_steps_per_s(),
            "rss_bytes": rss_bytes(),
        }
        self._append(line)
        self._observer.step("train", line)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One line in steps.jsonl per evaluation."""
        assert self.trainer is not None and self.trainer.last_evaluation is not None
        record = self.trainer.last_evaluation
        self.history.append(record)
        self._append({"step": record["step"], "epoch": record["epoch"], "eval": record})
        self._observer.evaluated(record)

    def _append(self, record: dict[str, Any]) -> None:
        if not distributed.is_rank_zero():
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())  # a checkpoint must not outlive the lines before it
        except OSError as error:
            raise DiskError(
                f"steps.jsonl could not be written: {error}",
                where=str(self._path),
                fix="free some space, then go on with --resume",
            ) from error


def _parse(line: str) -> dict[str, Any] | None:
    """A line of steps.jsonl; None for half of one, which a kill leaves, and what no run writes."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = _tells(record, "step")
    if whole and "loss" in record:
        whole = _tells(record, "epoch", "loss", "learning_rate")
    if whole and "eval" in record:
        whole = _tells(record["eval"], "step", "score")
    return record if whole else None


def _tells(record: Any, *keys: str) -> bool:
    """Whether it is a record with these numbers."""
    return isinstance(record, dict) and all(isinstance(record.get(k), int | float) for k in keys)


class ProbeCallback(TrainerCallback):
    """Measures memory at steady state: once, in the second step, when optimizer state exists.

    The optimizer is measured in that step. Forward, backward and evaluation are measured right
    after it on the longest examples of the data, the worst case of dynamic padding; the
    gradients of that extra pass are thrown away and the random state is restored, so the run is
    the same with and without it.
    """

    def __init__(self, meter: Any, probe: Callable[[], None]) -> None:
        self._meter, self._probe = meter, probe
        self._phase: Any = None
        self._done = False
        self._steps_seen = 0

    def _due(self, state: Any) -> bool:
        # Before the second step since start; or the first, where there is no second.
        return not self._done and (
            self._steps_seen == 1 or state.global_step + 1 >= state.max_steps
        )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to count."""
        if self._due(state):
            self._phase = self._meter.phase("optimizer")
            self._phase.__enter__()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End counting the optimizer."""
        if self._phase is not None:
            self._phase.__exit__(None, None, None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gradients are dropped by now: probe the other phases."""
        self._steps_seen += 1
        if self._phase is not None:
            self._phase, self._done = None, True
            self._probe()


class SaveAfterEvaluation(TrainerCallback):
    """Where an epoch's end is evaluated, a checkpoint due at its last step is made after that.

    transformers saves within the step: a run that went on from there would never make up for the
    evaluation, nor for what it drew and what early stopping learnt from it.
    """

    def __init__(self) -> None:
        self._due = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The last one of an epoch, or of all: put it off."""
        last = control.should_training_stop or float(state.epoch).is_integer()
        if control.should_save and last and args.eval_strategy == "epoch":
            control.should_save, self._due = False, True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What was put off is due now, once it is evaluated."""
        control.should_save, self._due = control.should_save or self._due, False


class InterruptCallback(TrainerCallback):
    """Ctrl-C ends training once a step is wholly done, with a checkpoint; a second one at once.

    That is before the next step: after this one's evaluation and saving, which a run that went on
    from in between would never make up for.
    """

    def __init__(self) -> None:
        self._first_of_epoch = True
        self.trainer: SparsegradTrainer | None = None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Between two epochs."""
        self._first_of_epoch = True
        self._stop(state)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Between two steps; an epoch's first has drawn its data loader's seed by now."""
        if not self._first_of_epoch:
            self._stop(state)
        self._first_of_epoch = False

    def _stop(self, state: Any) -> None:
        if not interruption.requested():  # all processes stop after the same step
            interruption.set_activity(f"step {state.global_step + 1}")
            return
        if state.global_step == 0:
            raise InterruptedRunError("stopped before the first step", fix="--resume starts it")
        assert self.trainer is not None
        folder = self.trainer.save_now()
        raise InterruptedRunError(
            f"stopped after step {state.global_step} of {state.max_steps}; {folder.name} is saved",
            fix="go on with --resume",
        )
