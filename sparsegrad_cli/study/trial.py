"""Run a trial of tuning: train its settings with every tuning seed, and prune it if it is poor.

A run of a trial is an ordinary `sparsegrad train` process. The coordinator reads its steps.jsonl
and, if the pruner decides so, stops it as Ctrl-C would. Evaluations are judged in order, however
far the run has come in the meantime: which trials are stopped depends only on scores, and only
their cost depends on timing.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsegrad_cli.errors import InterruptedRunError
from sparsegrad_cli.recipe.load_recipe import with_settings
from sparsegrad_cli.recipe.schema import Recipe
from sparsegrad_cli.records.run import ErrorBlock, Evaluation, RunRecord
from sparsegrad_cli.records.store import RUN, write
from sparsegrad_cli.records.study import CellStatus, Trial, TrialRun
from sparsegrad_cli.study.folder import StudyFolder
from sparsegrad_cli.study.optuna_trials import NEXT_SEED, Pruner, TrialStore, goodness
from sparsegrad_cli.study.runs import Runs, can_resume, find_run, is_done
from sparsegrad_cli.study.search_space import Series
from sparsegrad_cli.study.statistics import mean

_ENDED = ("done", "failed", "out_of_memory")
_WEIGHTS = ("checkpoint-*", "adapter", "model", "basis.safetensors")


class TrialRunner:
    """Run a trial: one run with its settings for every tuning seed, one after another.

    Args:
        series: the series that the trial belongs to.
        number: the trial's number in the series, from 0.
        settings: values by recipe key.
        pruner: decides when to stop, based on the earlier trials.
        store: stores the seconds that interrupted attempts took.
    """

    def __init__(
        self,
        series: Series,
        number: int,
        settings: Mapping[str, Any],
        pruner: Pruner,
        store: TrialStore,
    ) -> None:
        self.series, self.pruner, self.store = series, pruner, store
        self._number, self._settings = number, dict(settings)

    def run(
        self, seeds: Sequence[int], folder: StudyFolder, runs: Runs, started: Callable[[], None]
    ) -> Trial | None:
        """Run the trial for all seeds, until one of its runs does not finish.

        Args:
            seeds: the tuning seeds.
            folder: the study's folder.
            runs: trains the runs.
            started: called after each run has been submitted.

        Returns:
            The trial's record; None if the study was stopped.

        Raises:
            InterruptedRunError: one run of the trial was stopped, but not the study.
        """
        ran: list[_SeedRun] = []
        for at, seed in enumerate(seeds):
            name = f"{self.series.name}-t{self._number}-s{seed}"
            run = _SeedRun(self, folder.trial(name), seed, at * NEXT_SEED)
            if not run.go(runs, started):
                return None
            ran.append(run)
            if run.status != "done":
                break
        records = [run.record(folder.path) for run in ran]
        return Trial(
            number=self._number,
            settings=self._settings,
            status=ran[-1].status,
            metric=next((run.metric for run in ran if run.metric), None),
            score=mean([record.score for record in records if record.score is not None]),
            loss=mean([record.loss for record in records if record.loss is not None]),
            seconds=sum(record.seconds or 0.0 for record in records),
            steps=sum(record.steps or 0 for record in records),
            error=ran[-1].error,
            runs=records,
        )

    def recipe(self, seed: int) -> Recipe:
        """Return the recipe of the trial's run for a seed."""
        return with_settings(self.series.recipe, self._settings, seed)


class _SeedRun:
    """One run of a trial.

    Args:
        trial: the trial that the run belongs to.
        folder: the run's folder.
        seed: the run's seed.
        offset: added to its steps, so that the pruner can tell the seeds' evaluations apart.
    """

    def __init__(self, trial: TrialRunner, folder: Path, seed: int, offset: int) -> None:
        self.folder = folder
        self._trial, self._seed, self._offset = trial, seed, offset
        self._recipe = trial.recipe(seed)
        self._log = StepLog(folder / "steps.jsonl")
        self._seconds = 0.0
        self._pruned_at: int | None = None
        self._ended: RunRecord | None = None

    def go(self, runs: Runs, started: Callable[[], None]) -> bool:
        """Train the run, or use it if it has finished before; return whether it has ended."""
        if is_done(self._recipe, self.folder):  # the run outlived the coordinator that started it
            run = find_run(self.folder)
            self._seconds = (run and run.time and run.time.total_s) or 0.0
            self._should_stop()
        elif not self._train(runs, started):
            return False
        self._tidy()
        self._ended = find_run(self.folder)
        return True

    def _train(self, runs: Runs, started: Callable[[], None]) -> bool:
        began = time.monotonic()
        runs.wait_for_owner(self.folder)
        if not can_resume(self._recipe, self.folder) and not is_done(self._recipe, self.folder):
            shutil.rmtree(self.folder, ignore_errors=True)  # its evaluations belong to another run
        ran = runs.train(self._recipe, self.folder, started=started, stop_when=self._should_stop)
        if not ran:
            return False
        self._should_stop()  # reads the last evaluations
        name, series = self.folder.name, self._trial.series.name
        self._seconds = self._trial.store.spent(series, name) + time.monotonic() - began
        run = find_run(self.folder)
        if self._pruned_at is not None or (run is not None and run.status in _ENDED):
            return True
        self._trial.store.spend(series, name, self._seconds)
        if not runs.stopping.is_set():
            raise InterruptedRunError(f"a trial was stopped: {name}", where=str(self.folder))
        return False

    def _should_stop(self) -> bool:
        """Pass new evaluations to the pruner, and return whether it stops the run."""
        for evaluation in self._log.evaluations():
            if evaluation.step == 0 or evaluation.score is None or self._pruned_at is not None:
                continue
            value = goodness(evaluation.score, evaluation.metric)
            if self._trial.pruner.stops(self._offset + evaluation.step, value):
                self._pruned_at = evaluation.step
        return self._pruned_at is not None

    def _tidy(self) -> None:
        """Record whether the run was pruned."""
        run = find_run(self.folder)
        if self._pruned_at is not None and run is not None and run.status != "done":
            what = f"stopped after step {self._pruned_at}: below the median of the earlier trials"
            error = ErrorBlock(title="Pruned", what=what, where=None, fix=None)
            write(run.changed(status="pruned", error=error), self.folder / RUN)

    @property
    def status(self) -> CellStatus:
        """How the run ended."""
        if self._pruned_at is not None:
            return "pruned"
        return self._ended.status if self._ended is not None else "failed"

    @property
    def metric(self) -> str | None:
        """The metric of the run's task."""
        return self._ended.task.metric if self._ended is not None and self._ended.task else None

    @property
    def error(self) -> str | None:
        """What went wrong, if something did."""
        error = self._ended.error if self._ended is not None else None
        return error.what if error is not None and self.status not in ("done", "pruned") else None

    def record(self, study: Path) -> TrialRun:
        """Return the run's scores and costs, with its folder relative to the study's."""
        metrics = self._ended.metrics if self._ended is not None else None
        best = (metrics.best if metrics else None) or self._log.best()
        return TrialRun(
            seed=self._seed,
            status=self.status,
            score=best.score if best else None,
            loss=best.loss if best else None,
            seconds=round(self._seconds, 3),
            steps=self._log.last_step,
            run_dir=str(self.folder.relative_to(study)),
        )


def remove_weights(folder: Path) -> None:
    """Remove the weights of a trial's run; its record stays."""
    for pattern in _WEIGHTS:
        for path in folder.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


class StepLog:
    """Reader of a steps.jsonl that a run is still writing.

    Args:
        path: the file, which need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._read = path, 0
        self.last_step = 0
        self._seen: list[Evaluation] = []

    def evaluations(self) -> Iterator[Evaluation]:
        """Yield the evaluations that were written since the last call, in order."""
        for line in self._lines():
            try:
                record = json.loads(line)
                self.last_step = max(self.last_step, int(record["step"]))
                found = Evaluation.model_validate(record["eval"])
            except (ValueError, KeyError, TypeError, RecursionError):
                continue  # not an evaluation, or a line cut off when the run was killed
            self._seen.append(found)
            yield found

    def best(self) -> Evaluation | None:
        """Return the best evaluation, without the one before training; None if there is none."""
        return max(
            (each for each in self._seen if each.step > 0 and each.score is not None),
            key=lambda each: goodness(each.score or 0.0, each.metric),
            default=None,
        )

    def _lines(self) -> list[bytes]:
        """Return new complete lines; all lines if the file was truncated by a resume."""
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
