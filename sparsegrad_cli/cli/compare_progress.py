"""Show a comparison while it runs: all runs together, and each run that trains."""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live

from sparsegrad_cli.cli.progress import Work, clock, on_terminal, work_line
from sparsegrad_cli.records.metric_direction import scale_of
from sparsegrad_cli.report.terminal import plain_line
from sparsegrad_cli.report.units import format_score, format_seconds, status_words
from sparsegrad_cli.study.progress import RunNow, StudyProgress

if TYPE_CHECKING:
    from sparsegrad_cli.recipe.study import LoadedStudy
    from sparsegrad_cli.records.study import CellEntry, StudyRecord

_ENDED = ("done", "failed", "out_of_memory")


class CompareProgress:
    """Print a line for each run that ends, and show how far all runs have come.

    On a terminal, a bar stands below the lines; in a pipe, a line follows each run.

    Args:
        study: The study.
        folder: Its folder.
        quiet: Show nothing.
        console: Of the terminal; stderr by default.
        live: Whether to draw; by default if stderr is a terminal.
    """

    def __init__(
        self,
        study: LoadedStudy,
        folder: Path,
        *,
        quiet: bool = False,
        console: Console | None = None,
        live: bool | None = None,
    ) -> None:
        self._quiet = quiet
        self._console = console or Console(stderr=True, highlight=False)
        self._progress = StudyProgress(study, folder)
        self._record: StudyRecord | None = None
        self._whole = Work("compare", unit="runs")
        self._told: int | None = None  # Runs that had ended at the last line.
        self._live: Live | None = None
        if not quiet and (on_terminal() if live is None else live):
            self._live = Live(
                get_renderable=self.shown,
                console=self._console,
                refresh_per_second=1,  # Each reads the logs of the runs that train.
                transient=True,
                redirect_stdout=False,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    @property
    def live(self) -> bool:
        """Whether a bar is drawn; then runs must not write to the same terminal."""
        return self._live is not None

    def tell(self, line: str, style: str = "") -> None:
        """Print a line."""
        if self._quiet:
            return
        if self._live is not None:
            self._console.print(plain_line(line, style=style))
        else:
            print(plain_line(line).plain, file=sys.stderr, flush=True)

    def update(self, record: StudyRecord) -> None:
        """Show a new record, and a line for each run that has ended since the one before."""
        before, self._record = self._record, record
        if before is not None:
            for old, new in zip(before.cells, record.cells, strict=False):
                if old.status != new.status and new.status in _ENDED:
                    self.tell(f"  {_outcome(new)}")
        if self._live is not None:
            self._live.start()  # Not earlier: solving a budget has a display of its own.
            return
        now = self._progress.now(record)
        if now.done != self._told:
            self._told = now.done
            times = f"elapsed {clock(self._whole.elapsed)}, ETA {clock(now.left_s)}"
            self.tell(f"compare: {now.done} of {now.total} runs done, {times}")

    def shown(self) -> RenderableType:
        """Return the bar of all runs and a line for each run that trains."""
        if self._record is None:
            return ""
        now = self._progress.now(self._record)
        whole, width = self._whole, self._console.width
        whole.total, whole.left = now.total, now.left_s
        whole.done = now.done + sum(run.share for run in now.running)
        return Group(
            work_line(whole, width), *(work_line(_work(run), width) for run in now.running)
        )


def _work(run: RunNow) -> Work:
    work = Work(f"  {run.name}", run.steps, done=run.step, left=run.left_s)
    work.began = run.began
    if run.loss is not None:
        work.values["loss"] = f"loss {run.loss:.4f}"
    if run.score is not None:
        scale = scale_of(run.metric)
        name = scale.words if scale.lower_is_better else "score"
        work.values["score"] = f"{name} {format_score(run.score, scale)}"
    return work


def _outcome(entry: CellEntry) -> str:
    """Return one line on a run that has ended: its score and time, or why it failed."""
    parts = [status_words(entry.status)]
    best = entry.run.metrics.best if entry.run and entry.run.metrics else None
    if entry.status == "done" and best is not None and best.score is not None:
        parts.append(f"score {format_score(best.score, scale_of(best.metric))}")
    if entry.status == "done" and entry.run and entry.run.time and entry.run.time.total_s:
        parts.append(format_seconds(entry.run.time.total_s))
    if entry.status != "done" and entry.error is not None:
        parts.append(entry.error.what)
    return f"{entry.task}  {entry.method}  seed {entry.seed}: {', '.join(parts)}"
