"""Show progress on stderr: bars on a terminal, and plain lines in a file or a pipe."""

from __future__ import annotations

import math
import os
import sys
import time
from dataclasses import dataclass, field
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sparsegrad_cli import distributed
from sparsegrad_cli.io.untrusted_text import printable_line
from sparsegrad_cli.progress import Observer
from sparsegrad_cli.records.metric_direction import METRICS, scale_of, set_metric
from sparsegrad_cli.report.units import format_bytes, format_score, format_seconds

_BAR, _SHORTER_BAR, _SHORTEST_BAR = 24, 12, 6  # Columns: alone, beside values, at all.
_REFRESHES = 4  # A second.
_VALUES = ("loss", "score", "rate", "rss")  # In the order in which they are shown.


@dataclass
class Work:
    """Steps of one kind, as far as they have come.

    Attributes:
        name: What is done, such as ``train``.
        total: Number of steps; None if it is not known.
        unit: What a step is, in the plural.
        done: Steps that are done, those of an earlier process included.
        values: Loss, score and so on, by name, as text.
        left: Seconds that are left; None estimates them from the steps of this process.
    """

    name: str
    total: int | None = None
    unit: str = "steps"
    done: float = 0
    values: dict[str, str] = field(default_factory=dict)
    left: float | None = None

    def __post_init__(self) -> None:
        self._first, self.began = self.done, time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds since the first step of this process began."""
        return time.monotonic() - self.began

    @property
    def eta(self) -> float | None:
        """Seconds until the last step is done; None if that cannot be said."""
        if self.left is not None or self.total is None or self.done <= self._first:
            return self.left
        return self.elapsed / (self.done - self._first) * max(0.0, self.total - self.done)

    @property
    def shown_values(self) -> list[str]:
        """The values in the order in which they are shown."""
        return [self.values[key] for key in _VALUES if key in self.values]

    @property
    def count(self) -> str:
        """The steps that are done: ``120/1,125 steps``."""
        total = "" if self.total is None else f"/{self.total:,}"
        return f"{int(self.done):>{max(0, len(total) - 1)},}{total} {self.unit}"


def clock(seconds: float | None) -> str:
    """Format seconds as ``1:02:03`` or ``2:03``; ``-:--`` if they are not known."""
    if seconds is None or not math.isfinite(seconds):
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def work_line(work: Work, width: int, *, ended: bool = False) -> RenderableType:
    """Return the line of some work, and a second one for values that do not fit.

    What does not fit is left out, except the number of steps: first the bar, then the times, then
    the end of the name.

    Args:
        work: What to show.
        width: Columns of the terminal.
        ended: Whether the work is over, so that nothing is left.
    """
    times = [f"elapsed {clock(work.elapsed)}"]
    if not ended and (work.total, work.left) != (None, None):
        times.append(f"ETA {clock(work.eta)}")
    figures = work.count
    for text in times:
        if len(figures) + 2 + len(text) <= width - min(len(work.name), 8) - 1:
            figures += f"  {text}"
    name = work.name[: max(1, width - len(figures) - 1)]
    room = width - len(name) - len(figures) - 2
    values, below = "  ".join(work.shown_values), ""
    if values and len(values) + 2 + _SHORTER_BAR > room:
        below, values = values, ""
    elif values:
        figures += f"  {values}"
        room -= len(values) + 2
    first: RenderableType = Text(f"{name} {figures}", no_wrap=True, overflow="crop")
    if work.total and room >= _SHORTEST_BAR:
        grid = Table.grid(padding=(0, 1, 0, 0))
        for _ in range(3):
            grid.add_column(no_wrap=True)
        bar = ProgressBar(total=work.total, completed=work.done, width=min(_BAR, room))
        grid.add_row(Text(name), bar, Text(figures))
        first = grid
    if not below:
        return first
    indent = len(name) - len(name.lstrip()) + 2
    below = f"{' ' * indent}{below}"[:width]
    return Group(first, Text(below, style="dim", no_wrap=True, overflow="crop"))


class _ProgressObserver(Observer):
    """Keep what a run does now; the classes below show it."""

    def __init__(self) -> None:
        self._name, self._began = "", time.monotonic()
        self._works: dict[str, Work] = {}

    def phase(self, name: str, detail: str = "") -> None:
        """End the phase before, and begin the next one."""
        self._end_phase()
        self._name, self._began = name, time.monotonic()
        self._phase_began(printable_line(detail))

    def total_steps(
        self, phase: str, steps: int | None, *, done: int = 0, unit: str = "steps"
    ) -> None:
        """Count the steps of some work from now on."""
        self._works[phase] = Work(phase, steps, unit, done)

    def step(self, phase: str, record: dict[str, Any]) -> None:
        """Count a step of some work and keep its values."""
        work = self._works.get(phase)
        if work is None:
            return
        if "loss" in record:
            work.values["loss"] = f"loss {record['loss']:.4f}"
        if record.get("steps_per_s"):
            work.values["rate"] = f"{record['steps_per_s']:.1f} steps/s"
        if record.get("rss_bytes"):
            work.values["rss"] = f"RSS {format_bytes(record['rss_bytes'])}"
        work.done = record["step"]
        if phase != self._name and work.done == work.total:
            self._end(phase)

    def evaluated(self, record: dict[str, Any]) -> None:
        """Show an evaluation, and keep its score beside the steps of training."""
        self._works.pop("evaluate", None)
        scale = scale_of(record.get("metric"))
        name = scale.words if scale.lower_is_better else "score"
        score = f"{name} {format_score(record['score'], scale)}"
        if "train" in self._works:
            self._works["train"].values["score"] = score
        value = math.nan if record["loss"] is None else record["loss"]
        loss = [] if scale is METRICS["loss"] else [f"loss {value:.4f}"]
        at = [f"step {record['step']}", f"epoch {record['epoch']:.2f}"]
        self._evaluation([*map(printable_line, (*at, score, *loss, *_other_sets(record)))])
        for sample in record.get("samples", ()):
            self._sample(printable_line(sample["prompt"]), printable_line(sample["answer"]))

    def close(self) -> None:
        """End the phase that is open. A second call does nothing."""
        self._end_phase()
        self._name = ""

    def _end_phase(self) -> None:
        own = self._works.pop(self._name, None)
        for name in list(self._works):
            self._end(name)
        if self._name:
            self._phase_ended(time.monotonic() - self._began, own)

    def _end(self, name: str) -> None:
        work = self._works.pop(name)
        if name not in ("evaluate", "samples"):  # Their results have lines of their own.
            self._work_ended(work)

    def _phase_began(self, detail: str) -> None:
        raise NotImplementedError

    def _phase_ended(self, seconds: float, work: Work | None) -> None:
        raise NotImplementedError

    def _work_ended(self, work: Work) -> None:
        raise NotImplementedError

    def _evaluation(self, parts: list[str]) -> None:
        raise NotImplementedError

    def _sample(self, prompt: str, answer: str) -> None:
        raise NotImplementedError


def _other_sets(record: dict[str, Any]) -> list[str]:
    """Return the scores on the validation sets after the first, such as ``ood_accuracy 61.0``."""
    metric = str(record.get("metric"))
    others = list(record.get("values", {}).items())[1:]
    return [
        f"{set_metric(name, metric)} {format_score(values[metric], scale_of(metric))}"
        for name, values in others
        if values.get(metric) is not None
    ]


class TerminalObserver(_ProgressObserver):
    """Show a run on a terminal while it happens; use it as a context manager.

    Args:
        console: Of the terminal; stderr by default.
    """

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self._console = console or Console(stderr=True, highlight=False)
        # Rich would send what is printed on standard output to this console, stderr.
        self._live = Live(
            get_renderable=self._shown,
            console=self._console,
            refresh_per_second=_REFRESHES,
            transient=True,
            redirect_stdout=False,
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def note(self, text: str) -> None:
        """Print a dim line."""
        # A note may quote files and servers, so it must not be read as markup.
        self._console.print(Text(f"  note: {printable_line(text)}", style="dim"))

    def close(self) -> None:
        """Stop drawing, and leave a line for the work that was open."""
        super().close()
        self._live.stop()

    def _shown(self) -> RenderableType:
        works = list(self._works.values())
        if self._name and not works:
            elapsed = clock(time.monotonic() - self._began)
            return Text(f"  {self._name}  elapsed {elapsed}", style="dim", no_wrap=True)
        return Group(*(work_line(work, self._console.width) for work in works))

    def _phase_began(self, detail: str) -> None:
        self._console.print(Text.assemble((self._name, "bold"), " ", (detail, "dim")))

    def _phase_ended(self, seconds: float, work: Work | None) -> None:
        if work is not None and self._name != "evaluate":
            self._work_ended(work)

    def _work_ended(self, work: Work) -> None:
        self._console.print(work_line(work, self._console.width, ended=True))

    def _evaluation(self, parts: list[str]) -> None:
        self._console.print(Text("  " + "  ".join(parts)))

    def _sample(self, prompt: str, answer: str) -> None:
        grid = Table.grid(padding=(0, 1))
        grid.add_row("   ", Text(prompt, style="dim"))
        grid.add_row("   ", Text(answer))
        self._console.print(grid)


class LineObserver(_ProgressObserver):
    """Write one plain line for each logged step, each evaluation, and both ends of a phase."""

    def note(self, text: str) -> None:
        """Write a line."""
        self._write(f"note: {printable_line(text)}")

    def step(self, phase: str, record: dict[str, Any]) -> None:
        """Write a line if the step was logged, which ``train.logging_steps`` decides."""
        super().step(phase, record)
        work = self._works.get(phase)
        if phase == "train" and work is not None and "loss" in record:
            times = [f"elapsed {clock(work.elapsed)}", f"ETA {clock(work.eta)}"]
            count = f"step {work.done:,} of {work.total:,}"
            parts = [count, *work.shown_values, *times]
            self._write(f"train: {', '.join(parts)}")

    def _phase_began(self, detail: str) -> None:
        self._write(f"{self._name}: {detail or 'begins'}")

    def _phase_ended(self, seconds: float, work: Work | None) -> None:
        count = "" if work is None else f"{work.count}, "
        self._write(f"{self._name}: {count}ended after {format_seconds(seconds)}")

    def _work_ended(self, work: Work) -> None:
        self._write(f"{work.name}: {work.count} after {format_seconds(work.elapsed)}")

    def _evaluation(self, parts: list[str]) -> None:
        self._write(f"evaluate: {', '.join(parts)}")

    def _sample(self, prompt: str, answer: str) -> None:
        self._write(f"sample: {prompt} -> {answer}")

    @staticmethod
    def _write(line: str) -> None:
        print(line, file=sys.stderr, flush=True)


def on_terminal() -> bool:
    """Return whether stderr is a terminal that can redraw a line."""
    return sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def make_observer(quiet: bool) -> Observer:
    """Return the observer of a command, to be used as a context manager.

    Among several processes only rank zero shows progress.
    """
    if quiet or not distributed.is_rank_zero():
        return Observer()
    return TerminalObserver() if on_terminal() else LineObserver()
