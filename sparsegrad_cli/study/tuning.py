"""Tune every method of a study before its runs, with the same number of trials on every task.

The trials of a method on a task run one after another. The next trial is therefore a function of
the earlier results, independent of the engine and of the number of runs at once.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sparsegrad_cli.errors import SparsegradError, UsageError
from sparsegrad_cli.io.atomic import write_text_atomic
from sparsegrad_cli.io.paths import remove_folder
from sparsegrad_cli.recipe.load_recipe import to_plain, with_settings
from sparsegrad_cli.recipe.study import Cell, LoadedStudy
from sparsegrad_cli.recipe.yaml_source import dump
from sparsegrad_cli.records.store import RUN, load_run, write
from sparsegrad_cli.records.study import (
    BestTrial,
    SearchDimension,
    Trial,
    TuningBlock,
    TuningSeries,
)
from sparsegrad_cli.report.render import write_run_report
from sparsegrad_cli.report.tuning import outcome_words, settings_words
from sparsegrad_cli.run.folder import adapter_file
from sparsegrad_cli.study.folder import TRIALS, TUNING, TUNING_BEFORE, StudyFolder
from sparsegrad_cli.study.optuna_trials import (
    PRUNER,
    SAMPLER,
    Pruner,
    TrialStore,
    best_trial,
    edges,
    ended_trial,
    load_optuna,
    propose,
    record_of,
)
from sparsegrad_cli.study.runs import Runs, is_done
from sparsegrad_cli.study.search_space import Series, series_of
from sparsegrad_cli.study.trial import TrialRunner, remove_weights

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial


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
                    f"{TUNING_BEFORE}; this version cannot continue it",
                    where="tune",
                    fix="finish it with that version, or start again with --overwrite",
                )
            if not make:
                return False
        self.store = TrialStore(path)
        found = [self.store.open(s.name, s.about(), make=make) for s in self._series]
        return all(found)

    def retry(self) -> None:
        """Start each series again that used up its trials without one that finished."""
        for series in self._series:
            if self._is_over(series) and best_trial(self._trials(series)) is None:
                self.store.forget(series.name, series.about())

    def block(self) -> TuningBlock:
        """Return the ``tuning`` block of compare.json."""
        return TuningBlock(
            trials=self._tune.trials,
            seeds=[] if isinstance(self._tune.seeds, str) else list(self._tune.seeds),
            own_seeds=self._tune.own,
            keys=self._tune.keys(),
            sampler=SAMPLER,
            pruner=PRUNER,
            optuna=load_optuna().__version__,
            series=[self._series_block(series) for series in self._series],
        )

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
        best = {(s.task, s.label, s.seed): best_trial(self._trials(s)) for s in self._series}
        cells = []
        for cell in self._study.cells:
            found = best[cell.task, cell.label, cell.seed if self._tune.own else None]
            if found is not None:
                recipe = with_settings(cell.loaded.recipe, found.settings)
                cells.append(replace(cell, loaded=replace(cell.loaded, recipe=recipe)))
        return replace(self._study, cells=tuple(cells))

    def _told(self, series: Series) -> list[FrozenTrial]:
        return self.store.ended(series.name, self._tune.trials)

    def _trials(self, series: Series) -> list[Trial]:
        return [record_of(trial) for trial in self._told(series)]

    def _is_over(self, series: Series) -> bool:
        return len(self._told(series)) >= self._tune.trials

    def _series_block(self, series: Series) -> TuningSeries:
        trials = self._trials(series)
        best = best_trial(trials) if self._is_over(series) else None
        return TuningSeries(
            task=series.task,
            method=series.label,
            seed=series.seed,
            metric=next((trial.metric for trial in trials if trial.metric), None),
            space=[SearchDimension(**dimension.to_json()) for dimension in series.space],
            seconds=sum(trial.seconds or 0.0 for trial in trials),
            best=None
            if best is None
            else BestTrial(
                number=best.number, settings=best.settings, score=best.score, loss=best.loss
            ),
            edges=edges(series.space, trials) if best else [],
            trials=trials,
        )

    # --- running trials

    def work(self) -> list[Callable[[], None]]:
        """Return one function for each series that has trials left; it runs them."""
        (self._folder.path / TRIALS).mkdir(exist_ok=True)
        return [partial(self._run, s) for s in self._series if not self._is_over(s)]

    def _run(self, series: Series) -> None:
        while not self._is_over(series):
            told = self._told(series)
            settings = propose(series.space, told, series.name, series.shift)
            seed = "" if series.seed is None else f"  seed {series.seed}"
            number = f"trial {len(told) + 1} of {self._tune.trials}"
            which = f"{series.task}  {series.label}{seed}  {number}"
            self._tell(f"{which}: {settings_words(settings)}")
            trial = TrialRunner(series, len(told), settings, Pruner(told), self.store)
            record = trial.run(series.seeds, self._folder, self._runs, self._save)
            if record is None:  # stopped; the same command proposes the same trial again
                return
            self.store.add(series.name, ended_trial(series.space, record, trial.pruner.seen))
            self._tidy(series)
            self._save()
            self._tell(f"{which}: {outcome_words(record)}")

    def _tidy(self, series: Series) -> None:
        """Remove the weights of a series' trials, but not of one that may become a reported run."""
        trials = self._trials(series)
        kept = best_trial(trials) if series.seed is not None else None
        for trial in trials:
            for run in trial.runs if trial is not kept else ():
                if run.run_dir is not None:
                    remove_weights(self._folder.path / run.run_dir)

    def adopt(self, cell: Cell, folder: Path) -> None:
        """Copy the best trial of a seed that is tuned by itself to the folder of its run.

        Nothing is done if the trial's weights are gone: then the run trains again.
        """
        tuned = (s for s in self._series if (s.task, s.label, s.seed) == _key(cell))
        best = next((best_trial(self._trials(series)) for series in tuned), None)
        source = best.runs[0].run_dir if best is not None and best.runs else None
        if source is None or not is_done(cell.loaded.recipe, self._folder.path / source):
            return
        if not adapter_file(self._folder.path / source):
            return
        remove_folder(folder)
        shutil.copytree(self._folder.path / source, folder)
        plain = {**to_plain(cell.loaded.recipe), "output_dir": str(folder.absolute())}
        write_text_atomic(folder / "recipe.yaml", dump(plain))
        record = load_run(folder).changed(name=folder.name, output_dir=str(folder))
        write(record, folder / RUN)
        write_run_report(folder, record)
        remove_weights(self._folder.path / source)


def _key(cell: Cell) -> tuple[str, str, int]:
    return cell.task, cell.label, cell.seed
