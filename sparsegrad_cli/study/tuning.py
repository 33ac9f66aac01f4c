"""Tune every method of a study before its runs, with the same number of trials on every task.

The trials of a method on a task run one after another. The next trial is therefore a function of
the earlier results, independent of the engine and of the number of runs at once. A run of a trial
is an ordinary `sparsegrad train` process. The coordinator reads its steps.jsonl and, if the pruner
decides so, stops it as Ctrl-C would. Evaluations are judged in order, however far the run has come
in the meantime: which trials are stopped depends only on scores, and only their cost on timing.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from sparsegrad_cli.errors import InterruptedRunError, SparsegradError, UsageError
from sparsegrad_cli.recipe.study import LoadedStudy
from sparsegrad_cli.records.run import ErrorBlock, Evaluation
from sparsegrad_cli.records.store import RUN, write
from sparsegrad_cli.records.study import Trial as TrialRecord
from sparsegrad_cli.report.tuning import outcome_words, settings_words
from sparsegrad_cli.study.folder import TRIALS, TUNING, TUNING_BEFORE, StudyFolder
from sparsegrad_cli.study.runs import Runs, can_resume, find_run, is_done
from sparsegrad_cli.study.search import (
    NEXT_SEED,
    PRUNER,
    SAMPLER,
    Pruner,
    TrialStore,
    best_trial,
    edges,
    ended_trial,
    entry_of,
    goodness,
    load_optuna,
    propose,
)
from sparsegrad_cli.study.search_space import Series, series_of, with_settings
from sparsegrad_cli.study.statistics import mean

_ENDED = ("done", "failed", "out_of_memory")
_HEAVY = ("checkpoint-*", "adapter", "model", "basis.safetensors")


class Tuning:
    """The tuning of a study: one series of trials for each method on each task.

    Args:
        study: a study with a ``tune`` section.
        folder: the study's folder, with the journal and the trials.
        runs: trains the trials.
        tell: called with a line before and after each trial.
        save: writes compare.json.

    Attributes:
        store: the open journal.
    """

    store: TrialStore

    def __init__(
        self,
        study: LoadedStudy,
        folder: StudyFolder,
        runs: Runs,
        tell: Callable[[str], None],
        save: Callable[[], None],
    ) -> None:
        assert study.study.tune is not None
        self._study, self._tune = study, study.study.tune
        self._folder, self._runs, self._tell, self._save = folder, runs, tell, save
        self._series = series_of(study)

    # --- stored trials

    def open(self, *, make: bool) -> bool:
        """Open the journal, and return whether it contains all series.

        Raises:
            UsageError: its trials have another space, or an older version stored them elsewhere.
            FileFormatError: the journal cannot be read.
        """
        path = self._folder.path / TUNING
        if not path.is_file():
            if (self._folder.path / TUNING_BEFORE).exists():
                raise UsageError(
                    f"{self._folder.path} was tuned by an earlier version, which kept trials in "
                    f"{TUNING_BEFORE}; this version cannot go on with them",
                    where="tune",
                    fix="finish it with that version, or begin again with --overwrite",
                )
            if not make:
                return False
        self.store = TrialStore(path)
        seeds = self._tune.seeds
        found = [self.store.open(s.name, s.about(seeds), make=make) for s in self._series]
        return all(found)

    def retry(self) -> None:
        """Start each series again that used up its trials without one that finished."""
        for series in self._series:
            if self._is_over(series) and best_trial(self._entries(series)) is None:
                self.store.forget(series.name, series.about(self._tune.seeds))

    def block(self) -> dict[str, Any]:
        """Return the ``tuning`` block of compare.json."""
        return {
            "trials": self._tune.trials,
            "seeds": list(self._tune.seeds),
            "keys": self._tune.keys(),
            "sampler": SAMPLER,
            "pruner": PRUNER,
            "optuna": load_optuna().__version__,
            "series": [self._series_block(series) for series in self._series],
        }

    def tuned(self) -> LoadedStudy | None:
        """Return the study with the best settings of each row; None while trials are missing.

        A row without a finished trial has no runs.

        Raises:
            SparsegradError: methods had different numbers of trials.
        """
        if not all(map(self._is_over, self._series)):
            return None
        counts = {series.name: len(self._told(series)) for series in self._series}
        if set(counts.values()) != {self._tune.trials}:
            raise SparsegradError(f"methods had different numbers of trials: {counts}")
        best = {(s.task, s.label): best_trial(self._entries(s)) for s in self._series}
        cells = []
        for cell in self._study.cells:
            found = best[cell.task, cell.label]
            if found is not None:
                recipe = with_settings(cell.loaded.recipe, found["settings"])
                cells.append(replace(cell, loaded=replace(cell.loaded, recipe=recipe)))
        return replace(self._study, cells=tuple(cells))

    def _told(self, series: Series) -> list[Any]:
        return self.store.ended(series.name, self._tune.trials)

    def _entries(self, series: Series) -> list[dict[str, Any]]:
        return [entry_of(trial) for trial in self._told(series)]

    def _is_over(self, series: Series) -> bool:
        return len(self._told(series)) >= self._tune.trials

    def _series_block(self, series: Series) -> dict[str, Any]:
        trials = self._entries(series)
        best = best_trial(trials) if self._is_over(series) else None
        kept = ("number", "settings", "score", "loss")
        return {
            "task": series.task,
            "method": series.label,
            "metric": next((trial["metric"] for trial in trials if trial["metric"]), None),
            "space": [dimension.to_json() for dimension in series.space],
            "seconds": sum(trial["seconds"] for trial in trials),
            "best": {key: best[key] for key in kept} if best else None,
            "edges": edges(series.space, trials) if best else [],
            "trials": trials,
        }

    # --- running trials

    def work(self) -> list[Callable[[], None]]:
        """Return one function for each series that has trials left; it runs them."""
        (self._folder.path / TRIALS).mkdir(exist_ok=True)
        return [partial(self._run, s) for s in self._series if not self._is_over(s)]

    def _run(self, series: Series) -> None:
        while not self._is_over(series):
            told = self._told(series)
            settings = propose(series.space, told, series.name)
            which = f"{series.task}  {series.label}  trial {len(told) + 1} of {self._tune.trials}"
            self._tell(f"{which}: {settings_words(settings)}")
            trial = Trial(series, len(told), settings, Pruner(told), self.store)
            entry = trial.run(self._tune.seeds, self._folder, self._runs, self._save)
            if entry is None:  # stopped; the same command proposes the same trial again
                return
            self.store.add(series.name, ended_trial(series.space, entry, trial.pruner.seen))
            self._save()
            self._tell(f"{which}: {outcome_words(TrialRecord.model_validate(entry))}")


class Trial:
    """A trial: one run with its settings for every tuning seed, one after another.

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
    ) -> dict[str, Any] | None:
        """Run the trial for all seeds, until one of its runs does not finish.

        Args:
            seeds: the tuning seeds.
            folder: the study's folder.
            runs: trains the runs.
            started: called after each run has been submitted.

        Returns:
            The trial's entry in compare.json; None if the study was stopped.

        Raises:
            InterruptedRunError: one run of the trial was stopped, but not the study.
        """
        found: list[dict[str, Any]] = []
        for at, seed in enumerate(seeds):
            name = f"{self.series.name}-t{self._number}-s{seed}"
            one = _TrialRun(self, folder.trial(name), seed, at * NEXT_SEED)
            if not one.go(runs, started):
                return None
            found.append({**one.result(), "run_dir": str(one.folder.relative_to(folder.path))})
            if found[-1]["status"] != "done":
                break
        return self._entry(found)

    def recipe(self, seed: int) -> Any:
        """Return the recipe of the trial's run for a seed."""
        return with_settings(self.series.recipe, self._settings, seed)

    def _entry(self, runs: list[dict[str, Any]]) -> dict[str, Any]:
        metrics = [run.pop("metric") for run in runs]
        errors = [run.pop("error") for run in runs]
        return {
            "number": self._number,
            "settings": self._settings,
            "status": runs[-1]["status"],
            "metric": next((metric for metric in metrics if metric), None),
            "score": mean([run["score"] for run in runs if run["score"] is not None]),
            "loss": mean([run["loss"] for run in runs if run["loss"] is not None]),
            "seconds": sum(run["seconds"] for run in runs),
            "steps": sum(run["steps"] for run in runs),
            "error": errors[-1],
            "runs": runs,
        }


class _TrialRun:
    """One run of a trial.

    Args:
        trial: the trial that the run belongs to.
        folder: the run's folder.
        seed: the run's seed.
        offset: added to its steps, so that the pruner can tell the seeds' evaluations apart.
    """

    def __init__(self, trial: Trial, folder: Path, seed: int, offset: int) -> None:
        self.folder = folder
        self._trial, self._seed, self._offset = trial, seed, offset
        self._recipe = trial.recipe(seed)
        self._log = StepLog(folder / "steps.jsonl")
        self._seconds = 0.0
        self._pruned_at: int | None = None

    def go(self, runs: Runs, started: Callable[[], None]) -> bool:
        """Train the run, or use it if it has finished before; return whether it has ended."""
        if is_done(self._recipe, self.folder):  # the run outlived the coordinator that started it
            run = find_run(self.folder)
            self._seconds = (run and run.time and run.time.total_s) or 0.0
            self._should_stop()
        elif not self._train(runs, started):
            return False
        self._tidy()
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
        """Record whether the run was pruned, and remove its weights; the record stays."""
        run = find_run(self.folder)
        if self._pruned_at is not None and run is not None and run.status != "done":
            what = f"stopped after step {self._pruned_at}: below the median of the trials before"
            error = ErrorBlock(title="Pruned", what=what, where=None, fix=None)
            write(run.changed(status="pruned", error=error), self.folder / RUN)
        for pattern in _HEAVY:
            for path in self.folder.glob(pattern):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)

    def result(self) -> dict[str, Any]:
        """Return the run's status, scores and costs."""
        run = find_run(self.folder)
        best = (run.metrics.best if run and run.metrics else None) or self._log.best()
        status = "pruned" if self._pruned_at is not None else run.status if run else "failed"
        error = run.error.what if run and run.error else None
        return {
            "seed": self._seed,
            "status": status,
            "metric": run.task.metric if run and run.task else None,
            "score": best.score if best else None,
            "loss": best.loss if best else None,
            "seconds": round(self._seconds, 3),
            "steps": self._log.last_step,
            "error": error if status not in ("done", "pruned") else None,
        }


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
