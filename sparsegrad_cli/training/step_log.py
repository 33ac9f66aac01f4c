"""steps.jsonl: one line for each logged loss and each evaluation, and how long steps take."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch

from sparsegrad_cli import distributed
from sparsegrad_cli.io.atomic import write_text_atomic
from sparsegrad_cli.io.jsonl import append_record
from sparsegrad_cli.progress import Observer
from sparsegrad_cli.records.environment import rss_bytes
from sparsegrad_cli.records.run import Evaluation, TrainingLoss
from sparsegrad_cli.run.step_lines import parse_line


class StepTimer:
    """Record the seconds that each step takes.

    Args:
        device: A CUDA device is synchronized before the clock is read, so that a step ends when
            its kernels have run.

    Attributes:
        durations: Seconds of each step, in order.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.durations: list[float] = []
        self._device = device
        self._started: float | None = None

    def start(self) -> None:
        """Start a step. A step that was started and not stopped is dropped."""
        self._started = self._now()

    def stop(self) -> float:
        """Stop the step and return its duration.

        Raises:
            RuntimeError: No step was started.
        """
        if self._started is None:
            raise RuntimeError("stop() without start()")
        duration = self._now() - self._started
        self._started = None
        self.durations.append(duration)
        return duration

    def _now(self) -> float:
        if self._device.startswith("cuda") and torch.cuda.is_available():
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def recent_steps_per_s(self, window: int = 20) -> float:
        """Return the rate over the last ``window`` steps, for progress lines."""
        return _rate(self.durations[-window:])

    def summary(self) -> dict[str, float]:
        """Return the rate, the median and the interquartile range: keys of run.json's ``time``."""
        lower, _, upper = (
            statistics.quantiles(self.durations, n=4, method="inclusive")
            if len(self.durations) > 1
            else (0.0, 0.0, 0.0)
        )
        return {
            "steps_per_s": _rate(self.durations),
            "step_median_s": statistics.median(self.durations) if self.durations else 0.0,
            "step_iqr_s": upper - lower,
        }


def _rate(durations: list[float]) -> float:
    total = sum(durations)
    return len(durations) / total if total > 0 else 0.0


class StepLog:
    """Write steps.jsonl, keep what was logged, and report progress to the observer.

    Args:
        run_dir: The run's folder.
        observer: Told of every step and evaluation.
        device: Of the run, for the timer.

    Attributes:
        evaluations: All evaluations so far.
        losses: All logged losses so far.
    """

    def __init__(self, run_dir: Path, observer: Observer, device: str = "cpu") -> None:
        self.timer = StepTimer(device)
        self.evaluations: list[Evaluation] = []
        self.losses: list[TrainingLoss] = []
        self._path = run_dir / "steps.jsonl"
        self._observer = observer

    def rewind(self, step: int | None, *, evaluated: bool = True) -> None:
        """Drop what was logged after the checkpoint that the run resumes from.

        Args:
            step: Of the checkpoint; None drops everything.
            evaluated: False drops the evaluation of that step, too, since it is repeated.
        """
        if step is None and distributed.is_rank_zero():
            self._path.unlink(missing_ok=True)
        if step is None or not self._path.is_file():
            return
        kept: list[str] = []
        for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
            entry = parse_line(line)
            if entry is None or entry.step > step:
                continue
            if isinstance(entry, Evaluation):
                if entry.step == step and not evaluated:
                    continue
                self.evaluations.append(entry)
            else:
                self.losses.append(entry)
            kept.append(line)
        distributed.barrier()  # All have read it.
        if distributed.is_rank_zero():
            write_text_atomic(self._path, "".join(f"{line}\n" for line in kept))

    def step_done(self, step: int) -> None:
        """Report a step to the observer."""
        rate = self.timer.recent_steps_per_s()
        self._observer.step("train", {"step": step, "steps_per_s": rate})

    def add_loss(self, loss: TrainingLoss) -> None:
        """Log a training loss."""
        self.losses.append(loss)
        line = loss.to_json() | {
            "steps_per_s": self.timer.recent_steps_per_s(),
            "rss_bytes": rss_bytes(),
        }
        self._append(line)
        self._observer.step("train", line)

    def add_evaluation(self, evaluation: Evaluation) -> None:
        """Log an evaluation."""
        self.evaluations.append(evaluation)
        content = evaluation.to_json()
        self._append({"step": evaluation.step, "epoch": evaluation.epoch, "eval": content})
        self._observer.evaluated(content)

    def _append(self, line: dict[str, Any]) -> None:
        if not distributed.is_rank_zero():
            return
        # On disk when this returns: a checkpoint must not outlive the lines before it.
        append_record(self._path, line, fix="free some space, then continue with --resume")
