"""Wall time of training steps, and of the phases of a run. Seconds throughout."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager


class StepTimer:
    """Records how long each step takes.

    Args:
        device: a CUDA device is synchronized before each reading of the clock, so that a step
            ends when its work does; other devices work in step with python.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.durations: list[float] = []
        self._device = device
        self._started: float | None = None

    def start(self) -> None:
        """A step begins. One that began before and never ended is dropped."""
        self._started = self._now()

    def stop(self) -> float:
        """The step is done; its duration.

        Raises:
            RuntimeError: no step has begun.
        """
        if self._started is None:
            raise RuntimeError("stop() without start()")
        duration = self._now() - self._started
        self._started = None
        self.durations.append(duration)
        return duration

    def _now(self) -> float:
        if self._device.startswith("cuda"):
            import torch

            if torch.cuda.is_available():
                torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def median(self) -> float:
        """Median duration; 0 before the first step."""
        return statistics.median(self.durations) if self.durations else 0.0

    def iqr(self) -> float:
        """Distance of the quartiles (linear interpolation, as numpy's); 0 for less than 2 steps."""
        if len(self.durations) < 2:
            return 0.0
        lower, _, upper = statistics.quantiles(self.durations, n=4, method="inclusive")
        return upper - lower

    def steps_per_s(self) -> float:
        """Steps over the time spent in steps; 0 before the first."""
        return _rate(self.durations)

    def recent_steps_per_s(self, window: int = 20) -> float:
        """The same over the last ``window`` steps: what a progress line shows."""
        return _rate(self.durations[-window:])

    def summary(self) -> dict[str, float]:
        """``steps_per_s``, ``step_median_s`` and ``step_iqr_s`` of run.json's ``time`` block."""
        return {
            "steps_per_s": self.steps_per_s(),
            "step_median_s": self.median(),
            "step_iqr_s": self.iqr(),
        }


def _rate(durations: list[float]) -> float:
    total = sum(durations)
    return len(durations) / total if total > 0 else 0.0


class PhaseClock:
    """Seconds by phase. A phase inside another is taken out of the outer one, so they add up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner: list[float] = []  # per open phase: time spent in phases inside it

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to ``name``, whether it ends well or not."""
        started = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            elapsed = time.perf_counter() - started
            own = elapsed - self._inner.pop()
            if self._inner:
                self._inner[-1] += elapsed
            self.seconds[name] = self.seconds.get(name, 0.0) + own

    def to_json(self) -> dict[str, float]:
        """``load_s``, ``train_s``, ... of run.json's ``time`` block."""
        return {f"{name}_s": seconds for name, seconds in self.seconds.items()}
