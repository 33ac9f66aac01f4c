"""Progress of a run. The command line renders it and tests record it."""

from __future__ import annotations

from typing import Any, Self


class Observer:
    """Receive the events of a run. Every method does nothing; override the ones you need.

    As a context manager, it is closed at the end.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def phase(self, name: str, detail: str = "") -> None:
        """Begin a phase: load, calibrate, train, evaluate, report. It ends the one before."""

    def note(self, text: str) -> None:
        """Tell the user something, such as a default that was chosen or rows that were dropped."""

    def total_steps(
        self, phase: str, steps: int | None, *, done: int = 0, unit: str = "steps"
    ) -> None:
        """Announce the number of steps of a phase, or of work inside the current phase.

        Args:
            phase: The phase, or the name of the work inside it, such as ``warm-up``.
            steps: Their number; None if it is not known.
            done: How many an earlier process has done.
            unit: What is counted, in the plural.
        """

    def step(self, phase: str, record: dict[str, Any]) -> None:
        """Finish one step of a phase; ``record`` has ``step`` and what is known about it."""

    def evaluated(self, record: dict[str, Any]) -> None:
        """Finish an evaluation; ``record`` has ``step``, ``score``, ``loss`` and ``values``."""

    def close(self) -> None:
        """End the run, whether it succeeded or failed."""
