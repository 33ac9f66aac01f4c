"""Tune every method of a study alike, before its cells run: as many trials each, on every task.

Trials of a method on a task go one after another, so that what is tried next is a function of what
was found before, whatever --jobs and however many processes share the comparison.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from sparsegrad_cli.errors import SparsegradError
from sparsegrad_cli.recipe.study import LoadedStudy
from sparsegrad_cli.records.study import Trial as TrialRecord
from sparsegrad_cli.report.tuning import outcome_words, settings_words
from sparsegrad_cli.study.claims import Claim
from sparsegrad_cli.study.folder import TRIALS, TUNING, StudyFolder
from sparsegrad_cli.study.jobs import Job
from sparsegrad_cli.study.proposals import (
    PRUNER,
    SAMPLER,
    Referee,
    TuningStore,
    ended_trial,
    entry_of,
    propose,
    quiet_optuna,
)
from sparsegrad_cli.study.space import Series, best_trial, edges, series_of, with_settings
from sparsegrad_cli.study.trials import Trial
from sparsegrad_cli.study.worker_pool import Crew


class Tuning:
    """All series of a comparison.

    Args:
        study: the study; it has a ``tune`` section.
        place: where tuning.db and the trials lie.
        crew: starts the runs.
        tell: called with a line before and after each trial.
        save: writes the ledger.
    """

    def __init__(
        self,
        study: LoadedStudy,
        place: StudyFolder,
        crew: Crew,
        tell: Callable[[str], None],
        save: Callable[[], None],
    ) -> None:
        assert study.study.tune is not None
        self._study, self._tune = study, study.study.tune
        self._place, self._crew, self._tell, self._save = place, crew, tell, save
        self._store: TuningStore | None = None
        self._series = series_of(study)

    # --- what is there

    def connect(self, *, make: bool) -> bool:
        """Open tuning.db; whether all series are in it now.

        Raises:
            UsageError: its trials are of another space.
            FileFormatError: it cannot be read.
        """
        path = self._place.path / TUNING
        if not make and not path.is_file():
            return False
        self._store = self._store or TuningStore(path)
        seeds = self._tune.seeds
        found = [self._store.open(s.name, s.about(seeds), make=make) for s in self._series]
        return all(found)

    def close(self) -> None:
        """Let go of tuning.db."""
        if self._store is not None:
            self._store.close()
            self._store = None

    @property
    def store(self) -> TuningStore:
        """The open tuning.db."""
        assert self._store is not None
        return self._store

    def retry(self) -> None:
        """Broken ones are run again: a series none of whose trials came to an end begins afresh."""
        for series in self._series:
            if self._is_over(series) and best_trial(self._entries(series)) is None:
                self.store.forget(series.name, series.about(self._tune.seeds))

    def _told(self, series: Series) -> list[Any]:
        return self.store.ended(series.name, self._tune.trials)

    def _entries(self, series: Series) -> list[dict[str, Any]]:
        return [entry_of(trial) for trial in self._told(series)]

    def _is_over(self, series: Series) -> bool:
        return len(self._told(series)) >= self._tune.trials

    def block(self) -> dict[str, Any]:
        """The ``tuning`` block of compare.json."""
        return {
            "trials": self._tune.trials,
            "seeds": list(self._tune.seeds),
            "keys": self._tune.keys(),
            "sampler": SAMPLER,
            "pruner": PRUNER,
            "optuna": quiet_optuna().__version__,
            "series": [self._series_block(series) for series in self._series],
        }

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

    def tuned(self) -> LoadedStudy | None:
        """The study with the best settings of each row; None while trials are missing.

        A row none of whose trials came to an end has no cells.

        Raises:
            SparsegradError: the methods did not have as many trials each.
        """
        if not all(map(self._is_over, self._series)):
            return None
        counts = {series.name: len(self._told(series)) for series in self._series}
        if set(counts.values()) != {self._tune.trials}:
            raise SparsegradError(f"not as many trials for every method: {counts}")
        best = {(s.task, s.label): best_trial(self._entries(s)) for s in self._series}
        cells = []
        for cell in self._study.cells:
            found = best[cell.task, cell.label]
            if found is not None:
                recipe = with_settings(cell.loaded.recipe, found["settings"])
                cells.append(replace(cell, loaded=replace(cell.loaded, recipe=recipe)))
        return replace(self._study, cells=tuple(cells))

    # --- what is done

    def jobs(self) -> list[Job]:
        """One a series: its trials go one after another, each knowing those before."""
        (self._place.path / TRIALS).mkdir(exist_ok=True)
        return [self._job(at, series) for at, series in enumerate(self._series, 1)]

    def _job(self, at: int, series: Series) -> Job:
        name = f"[tuning {at}/{len(self._series)}] {series.task}  {series.label}"
        claim = self._place.trial(f"{series.task}-{series.label}.claim")
        return Job(name, claim, lambda: self._is_over(series), lambda held: self._run(series, held))

    def _run(self, series: Series, held: Claim) -> None:
        while not self._is_over(series):
            told = self._told(series)
            settings = propose(series.space, told, series.name)
            which = f"{series.task}  {series.label}  trial {len(told) + 1} of {self._tune.trials}"
            self._tell(f"{which}: {settings_words(settings)}")
            trial = Trial(series, len(told), settings, Referee(told), self.store)
            locks = [held, *self._place.presence]
            entry = trial.run(self._tune.seeds, self._place, self._crew, locks, self._save)
            if entry is None:  # stopped: the next one who comes proposes the same
                return
            self.store.add(series.name, ended_trial(series.space, entry, trial.referee.seen))
            self._save()
            self._tell(f"{which}: {outcome_words(TrialRecord.model_validate(entry))}")
