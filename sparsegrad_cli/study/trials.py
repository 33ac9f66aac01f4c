"""One trial of tuning: its settings under every seed of tuning, one run after another.

A run of a trial is what a cell is, in a process of its own, and nothing in it knows that it is one.
The comparison reads its steps.jsonl and, where the pruner says so, stops it as Ctrl-C would. So a
trial trains exactly as a cell does, is resumed like one, and no part of training has to learn about
tuning. Every evaluation is judged in its turn, however far the run has come meanwhile: which trials
are stopped is a function of scores, and only what they cost goes by the clock.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsegrad_cli.errors import InterruptedRunError
from sparsegrad_cli.records.store import write_json_atomic
from sparsegrad_cli.report.access import block, dig, number, text
from sparsegrad_cli.study.claims import FileLock
from sparsegrad_cli.study.folder import StudyFolder
from sparsegrad_cli.study.jobs import POLL_S
from sparsegrad_cli.study.proposals import NEXT_SEED, Referee, TuningStore
from sparsegrad_cli.study.space import Series, goodness, with_settings
from sparsegrad_cli.study.statistics import mean
from sparsegrad_cli.study.worker_pool import Crew, can_resume, is_of, run_in, stop_process

_ENDED = ("done", "failed", "out_of_memory")
_HEAVY = ("checkpoint-*", "adapter", "model", "basis.safetensors")


class Trial:
    """A trial that is being run.

    Args:
        series: whose it is.
        number: its place there, from 0.
        settings: by recipe key.
        referee: knows the trials before.
        store: keeps what interrupted attempts took.
    """

    def __init__(
        self,
        series: Series,
        number: int,
        settings: Mapping[str, Any],
        referee: Referee,
        store: TuningStore,
    ) -> None:
        self.referee = referee
        self._series, self._number, self._settings = series, number, dict(settings)
        self._store = store

    def run(
        self,
        seeds: Sequence[int],
        place: StudyFolder,
        crew: Crew,
        held: Sequence[FileLock],
        begun: Callable[[], None],
    ) -> dict[str, Any] | None:
        """Run it.

        Args:
            seeds: all of them, until one is not done.
            place: of the comparison.
            crew: starts the runs.
            held: locks for them to hold.
            begun: called after each start.

        Returns:
            The trial as compare.json has it; None if the comparison was stopped.
        """
        runs: list[dict[str, Any]] = []
        for at, seed in enumerate(seeds):
            folder = place.trial(f"{self._series.name}-t{self._number}-s{seed}")
            one = _Run(self, folder, seed, at * NEXT_SEED)
            if not one.go(crew, held, begun):
                return None
            runs.append({**one.result(), "run_dir": str(folder.relative_to(place.path))})
            if runs[-1]["status"] != "done":
                break
        return self._entry(runs)

    def _entry(self, runs: list[dict[str, Any]]) -> dict[str, Any]:
        metrics = [run.pop("metric") for run in runs]
        return {
            "number": self._number,
            "settings": self._settings,
            "status": runs[-1]["status"],
            "metric": next((metric for metric in metrics if metric), None),
            "score": mean([run["score"] for run in runs if run["score"] is not None]),
            "loss": mean([run["loss"] for run in runs if run["loss"] is not None]),
            "seconds": sum(run["seconds"] for run in runs),
            "steps": sum(run["steps"] for run in runs),
            "error": runs[-1].pop("error"),
            "runs": [{key: run[key] for key in run if key != "error"} for run in runs],
        }

    def recipe(self, seed: int) -> Any:
        """The recipe of its run under a seed."""
        return with_settings(self._series.recipe, self._settings, seed)

    def spent(self, run: str, seconds: float | None = None) -> float:
        """Seconds of interrupted attempts at a run so far; with ``seconds``, noted down anew."""
        if seconds is not None:
            self._store.spend(self._series.name, run, seconds)
        return self._store.spent(self._series.name, run)


class _Run:
    """One run of a trial."""

    def __init__(self, trial: Trial, folder: Path, seed: int, offset: int) -> None:
        self._trial, self._folder, self._seed = trial, folder, seed
        self._recipe, self._offset = trial.recipe(seed), offset
        self._log = TrialLog(folder / "steps.jsonl")
        self._seconds = 0.0
        self._pruned_at: int | None = None

    def go(self, crew: Crew, held: Sequence[FileLock], begun: Callable[[], None]) -> bool:
        """Run it, or take one that has ended; whether it has.

        Raises:
            InterruptedRunError: somebody stopped this run alone.
        """
        run = run_in(self._folder)
        if is_of(run, self._recipe) and dig(run, "status") == "done":
            # It outlived the process that had started it.
            self._seconds = number(run, "time", "total_s") or 0.0
            self._judge()
        elif not self._start(crew, held, begun):
            return False
        self._tidy()
        return True

    def _start(self, crew: Crew, held: Sequence[FileLock], begun: Callable[[], None]) -> bool:
        if not can_resume(self._recipe, self._folder):
            shutil.rmtree(self._folder, ignore_errors=True)  # its evaluations are not this run's
        started = time.monotonic()
        process = crew.start(self._recipe, self._folder, held)
        if process is None:
            return False
        begun()
        self._watch(process)
        crew.wait(process, self._folder)
        name = self._folder.name
        self._seconds = self._trial.spent(name) + time.monotonic() - started
        status = dig(run_in(self._folder), "status")
        if self._pruned_at is not None or status in _ENDED:
            return True
        self._trial.spent(name, self._seconds)
        if not crew.stopping.is_set():
            raise InterruptedRunError(f"a trial was stopped: {name}", where=str(self._folder))
        return False

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """Until it has ended, by itself or because it is not worth going on."""
        over = False
        while not over:
            try:
                process.wait(timeout=POLL_S)
                over = True
            except subprocess.TimeoutExpired:
                pass
            if self._judge():
                stop_process(process)
                return

    def _judge(self) -> bool:
        """Judge what was evaluated since the last look; whether to stop."""
        for evaluation in self._log.evaluations():
            step, score = int(evaluation["step"]), number(evaluation, "score")
            if step == 0 or score is None or self._pruned_at is not None:
                continue
            value = goodness(score, text(evaluation, "metric"))
            if self._trial.referee.stops(self._offset + step, value):
                self._pruned_at = step
        return self._pruned_at is not None

    def _tidy(self) -> None:
        """Say that it was pruned; its record is kept, its weights are not."""
        run = run_in(self._folder)
        if self._pruned_at is not None and run is not None and run["status"] != "done":
            what = f"stopped after step {self._pruned_at}: below the median of the trials before"
            error = {"title": "Pruned", "what": what, "where": None, "fix": None}
            write_json_atomic(
                self._folder / "run.json", {**run, "status": "pruned", "error": error}
            )
        for pattern in _HEAVY:
            for path in self._folder.glob(pattern):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)

    def result(self) -> dict[str, Any]:
        """What came out, and what it took."""
        run = run_in(self._folder)
        for _ in self._log.evaluations():
            pass
        best = block(run, "metrics", "best") or self._log.best()
        status = "pruned" if self._pruned_at is not None else text(run, "status") or "failed"
        return {
            "seed": self._seed,
            "status": status,
            "metric": text(run, "task", "metric"),
            "score": number(best, "score"),
            "loss": number(best, "loss"),
            "seconds": round(self._seconds, 3),
            "steps": self._log.last_step,
            "error": text(run, "error", "what") if status not in ("done", "pruned") else None,
        }


class TrialLog:
    """steps.jsonl of a run that writes to it.

    Args:
        path: the file; it need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._read = path, 0
        self.last_step = 0
        self._seen: list[Mapping[str, Any]] = []

    def evaluations(self) -> Iterator[Mapping[str, Any]]:
        """Those written since the last call, in their order."""
        for line in self._lines():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):  # torn by a kill, before the run was resumed
                continue
            step = number(record, "step")
            if step is None:
                continue
            self.last_step = max(self.last_step, int(step))
            found = block(record, "eval")
            if number(found, "step") is not None:
                self._seen.append(found)
                yield found

    def best(self) -> Mapping[str, Any]:
        """The best evaluation after the first step; empty without one."""
        there = [e for e in self._seen if e["step"] > 0 and number(e, "score") is not None]
        return max(there, key=lambda e: goodness(e["score"], text(e, "metric")), default={})

    def _lines(self) -> list[bytes]:
        """Whole lines beyond what has been read; all of them once the file was cut for a resume."""
        try:
            with self._path.open("rb") as file:
                if file.seek(0, 2) < self._read:
                    self._read = 0
                file.seek(self._read)
                content = file.read()
        except OSError:
            return []
        whole = content[: content.rfind(b"\n") + 1]
        self._read += len(whole)
        return whole.splitlines()
