"""Who watches a run. The base class does nothing; the command line renders, tests record."""

from __future__ import annotations

from typing import Any


class Observer:
    """Told of what happens in a run, as it happens. Override what you need."""

    def phase(self, name: str, detail: str = "") -> None:
        """A phase began: load, calibrate, train, evaluate, report."""

    def note(self, text: str) -> None:
        """Something the user should know: a default taken, a row dropped."""

    def total_steps(self, phase: str, steps: int) -> None:
        """How many steps the phase will have."""

    def step(self, phase: str, record: dict[str, Any]) -> None:
        """One step of a phase is done; ``record`` has ``step`` and what is known of it."""

    def evaluated(self, record: dict[str, Any]) -> None:
        """An evaluation is done: ``step``, ``score``, ``loss``, ``values``."""

    def close(self) -> None:
        """The run is over, well or not."""
