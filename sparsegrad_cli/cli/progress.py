"""Show progress on stderr: phases, loss, score, steps per second, memory."""

from __future__ import annotations

import math
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from sparsegrad_cli import distributed
from sparsegrad_cli.io.untrusted_text import printable_line
from sparsegrad_cli.progress import Observer
from sparsegrad_cli.records.metric_direction import METRICS, scale_of
from sparsegrad_cli.report.units import format_bytes, format_score


class ProgressObserver(Observer):
    """Show a run while it happens; use it as a context manager."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}", markup=False),
            TimeRemainingColumn(),
            console=self._console,
            transient=False,
        )
        self._tasks: dict[str, Any] = {}
        self._state: dict[str, str] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def close(self) -> None:
        """Stop drawing, and leave the bars on the screen."""
        self._progress.stop()

    def phase(self, name: str, detail: str = "") -> None:
        """Print a line for the phase that begins."""
        self._progress.console.print(
            Text.assemble((name, "bold"), " ", (printable_line(detail), "dim"))
        )

    def note(self, text: str) -> None:
        """Print a dim line."""
        # A note may quote files and servers, so it must not be read as markup.
        self._progress.console.print(Text(f"  note: {printable_line(text)}", style="dim"))

    def total_steps(self, phase: str, steps: int) -> None:
        """Add a bar for a phase that has steps."""
        self._state = {}
        self._tasks[phase] = self._progress.add_task(phase, total=steps, state="")

    def step(self, phase: str, record: dict[str, Any]) -> None:
        """Move the bar of a phase and show the new values."""
        if "loss" in record:
            self._state["loss"] = f"loss {record['loss']:.4f}"
        if record.get("steps_per_s"):
            self._state["rate"] = f"{record['steps_per_s']:.1f} steps/s"
        if record.get("rss_bytes"):
            self._state["rss"] = f"RSS {format_bytes(record['rss_bytes'])}"
        if phase in self._tasks:
            self._progress.update(self._tasks[phase], completed=record["step"], state=self._shown())

    def evaluated(self, record: dict[str, Any]) -> None:
        """Print a line for an evaluation."""
        scale = scale_of(record.get("metric"))
        name = scale.words if scale.lower_is_better else "score"
        score = f"{name} {format_score(record['score'], scale)}"
        self._state["score"] = score
        if "train" in self._tasks:  # No step follows the last one to show its score.
            self._progress.update(self._tasks["train"], state=self._shown())
        value = math.nan if record["loss"] is None else record["loss"]
        loss = "" if scale is METRICS["loss"] else f"  loss {value:.4f}"
        text = f"  step {record['step']:>5}  epoch {record['epoch']:.2f}  {score}{loss}"
        self._progress.console.print(Text(text))

    def _shown(self) -> str:
        return "  ".join(self._state.values())


def make_observer(quiet: bool) -> Observer:
    """Return the observer of a command, to be used as a context manager.

    Among several processes only rank zero shows progress.
    """
    silent = quiet or not distributed.is_rank_zero()
    return Observer() if silent else ProgressObserver()
