"""How far the runs of a study have come, and an estimate of the time that is left."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsegrad_cli.recipe.schema import TrainSection
from sparsegrad_cli.recipe.study import LoadedStudy
from sparsegrad_cli.records.study import CellEntry, StudyRecord

_OPEN = ("pending", "running", "interrupted")  # Statuses of runs that are still to be trained.
_TAIL = 16 * 1024  # Bytes at the end of steps.jsonl that are read.
_ENOUGH = 0.02  # Share of a run after which its own speed says how long it takes.

_Row = tuple[str, str]
_Key = tuple[str, str, int]


@dataclass(frozen=True)
class RunNow:
    """A run that trains now.

    Attributes:
        name: Method, seed and task.
        step: Its last logged optimizer step.
        steps: All its steps; None before the first one is logged.
        share: Share of its training that is done.
        began: When this process saw it start, by ``time.monotonic()``.
        left_s: Seconds until it ends; None if that cannot be said.
        loss: Its last training loss.
        score: Its last evaluation's score, with ``metric``.
    """

    name: str
    step: int
    steps: int | None
    share: float
    began: float
    left_s: float | None = None
    loss: float | None = None
    score: float | None = None
    metric: str | None = None


@dataclass(frozen=True)
class StudyNow:
    """A study at one moment.

    Attributes:
        done: Runs and tuning trials that have ended.
        total: All runs and tuning trials.
        left_s: Seconds until the last one ends; None before a run has ended or taken steps.
        running: The runs that train now.
    """

    done: int
    total: int
    left_s: float | None
    running: list[RunNow] = field(default_factory=list)


class StudyProgress:
    """Follow a study by its record and by the logs of the runs that train.

    Args:
        study: The study.
        folder: Its folder.
        clock: Returns seconds; for tests.
    """

    def __init__(
        self, study: LoadedStudy, folder: Path, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._folder, self._clock = folder, clock
        self._train: dict[_Key, TrainSection] = {
            (cell.task, cell.label, cell.seed): cell.loaded.recipe.train for cell in study.cells
        }
        self._seen: dict[_Key, tuple[float, float]] = {}  # When it started here, and its share then

    def now(self, record: StudyRecord) -> StudyNow:
        """Return how far the study has come.

        Args:
            record: Its record, as last written.
        """
        seconds = _seconds_of_ended(record)
        running = [self._running(e, seconds) for e in record.cells if e.status == "running"]
        waiting = [e for e in record.cells if e.status in _OPEN and e.status != "running"]
        left: list[float | None] = [run.left_s for run in running]
        left += [_expected(seconds, (entry.task, entry.method)) for entry in waiting]
        done, total = len(record.cells) - len(left), len(record.cells)
        if record.tuning is not None:
            if record.tuning.own_seeds:  # A run is then the best of its trials.
                left = []
            for series in record.tuning.series:
                ended, trials = len(series.trials), record.tuning.trials or 0
                done, total = done + ended, total + trials
                left += [_expected(seconds, (series.task, series.method))] * (trials - ended)
        jobs = max(1, min(record.jobs or 1, len(left)))
        known = [each for each in left if each is not None]
        left_s = None
        if len(known) == len(left):
            longest = max((run.left_s or 0.0 for run in running), default=0.0)
            left_s = max(sum(known) / jobs, longest)
        return StudyNow(done, total, left_s, running)

    def _running(self, entry: CellEntry, seconds: dict[_Row, list[float]]) -> RunNow:
        """Return a run that trains; a run without ended ones of its row adds its estimate."""
        key, row = (entry.task, entry.method, entry.seed), (entry.task, entry.method)
        last = _last_values(self._folder / str(entry.run_dir) / "steps.jsonl")
        step, share, steps = int(last.get("step") or 0), 0.0, None
        train = self._train.get(key)
        if train is not None and train.max_steps > 0:
            share, steps = step / train.max_steps, train.max_steps
        elif train is not None and step:
            share = float(last.get("epoch") or 0.0) / train.num_train_epochs
            steps = round(step / share) if share > 0 else None
        share = min(1.0, share)
        began, before = self._seen.setdefault(key, (self._clock(), share))
        elapsed = self._clock() - began
        left: float | None
        if share - before >= _ENOUGH:
            left = elapsed / (share - before) * (1 - share)
            seconds.setdefault(row, [elapsed / (share - before)])
        else:
            expected = _expected(seconds, row)
            left = None if expected is None else max(0.0, expected - elapsed)
        return RunNow(
            f"{entry.method} seed {entry.seed} {entry.task}",
            step,
            steps,
            share,
            began,
            left,
            last.get("loss"),
            last.get("score"),
            last.get("metric"),
        )


def _seconds_of_ended(record: StudyRecord) -> dict[_Row, list[float]]:
    """Return (task, method) -> seconds of each run or trial that finished."""
    found: dict[_Row, list[float]] = defaultdict(list)
    for entry in record.cells:
        if entry.status == "done" and entry.run and entry.run.time and entry.run.time.total_s:
            found[entry.task, entry.method].append(entry.run.time.total_s)
    for series in record.tuning.series if record.tuning is not None else []:
        ended = [t.seconds for t in series.trials if t.status == "done" and t.seconds]
        found[series.task, series.method] += ended
    return {row: seconds for row, seconds in found.items() if seconds}


def _expected(seconds: dict[_Row, list[float]], row: _Row) -> float | None:
    """Return the mean seconds of a row's runs, else of its task's, else of all."""
    task = [each for other, found in seconds.items() if other[0] == row[0] for each in found]
    everything = [each for found in seconds.values() for each in found]
    return _mean(seconds.get(row, ())) or _mean(task) or _mean(everything)


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return sum(found) / len(found) if found else None


def _last_values(path: Path) -> dict[str, Any]:
    """Return the last step, epoch, loss, score and metric in the end of a run's steps.jsonl."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL))
            lines = file.read().splitlines()
    except OSError:
        return {}
    values: dict[str, Any] = {}
    for line in lines:
        try:
            entry = json.loads(line)
            values |= {key: entry[key] for key in ("step", "epoch", "loss") if key in entry}
            if "eval" in entry:
                values |= {key: entry["eval"][key] for key in ("score", "metric")}
        except (ValueError, KeyError, TypeError, RecursionError):
            continue  # A line that is cut off, or still being written.
    return values
