"""Run a study: one coordinator tunes, trains every run through an engine, and writes compare.json.

compare.json is written before and after every run, so that an interrupted study continues where it
stopped. If the study is tuned, tuning comes first, and the runs use the best settings found.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sparsegrad_cli.errors import InterruptedRunError
from sparsegrad_cli.recipe.load_recipe import to_plain
from sparsegrad_cli.recipe.study import Cell, LoadedStudy
from sparsegrad_cli.recipe.study_section import EngineSection
from sparsegrad_cli.records.base import now
from sparsegrad_cli.records.environment import collect, git_state
from sparsegrad_cli.records.run import ErrorBlock, RunRecord
from sparsegrad_cli.records.store import write
from sparsegrad_cli.records.study import (
    CellEntry,
    CellStatus,
    PlanRecord,
    PlanRow,
    PublishedFigure,
    StudyRecord,
)
from sparsegrad_cli.study.cluster_engines import RayEngine, SlurmEngine
from sparsegrad_cli.study.engines import Engine, LocalEngine
from sparsegrad_cli.study.evidence import evidence, with_measured
from sparsegrad_cli.study.folder import SLURM, StudyFolder, study_digest
from sparsegrad_cli.study.parity import check_parity
from sparsegrad_cli.study.runs import Runs, find_run, is_done

if TYPE_CHECKING:
    from sparsegrad_cli.study.tuning import Tuning

Tell = Callable[[str], None]
_UNTUNED = ErrorBlock(
    title="Tuning",
    what="no trial of this row finished",
    where="tuning",
    fix="see the trials' errors in the report; the same command tries them again",
)


def make_engine(
    section: EngineSection, folder: Path, *, jobs: int | None = None, quiet: bool = False
) -> Engine:
    """Return the engine that a study requests.

    Args:
        section: ``engine:`` of the study, after the overrides of the command line.
        folder: the study's folder, in which Slurm's logs are written.
        jobs: number of runs at once; overrides the section's.
        quiet: whether runs hide their progress.

    Raises:
        UsageError: the engine's package is not installed, or the engine cannot be reached.
    """
    jobs = jobs or section.jobs
    if section.name == "local":
        return LocalEngine(jobs or 1, quiet=quiet)
    if section.name == "slurm":
        return SlurmEngine(section.slurm, folder / SLURM, jobs)
    return RayEngine(section.ray, jobs)


def run_study(
    study: LoadedStudy,
    folder: StudyFolder,
    *,
    command: str,
    jobs: int | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    solve: Callable[[LoadedStudy, StudyRecord | None], LoadedStudy] = lambda study, kept: study,
    tell: Tell = lambda line: None,
    saved: Callable[[StudyRecord], None] = lambda record: None,
) -> StudyRecord:
    """Run all runs of a study that have not finished.

    Args:
        study: the checked study.
        folder: the study's folder, which is locked until this function returns.
        command: the command line, for the record.
        jobs: number of runs at once; overrides the engine's.
        overwrite: repeat finished runs.
        quiet: whether runs hide their progress.
        solve: solves the study's budget, given the record in compare.json.
        tell: called with a line before each run.
        saved: called with the record each time compare.json was written, one call at a time.

    Returns:
        The content of compare.json.

    Raises:
        BusyError: another process has locked the folder; the message names it.
        UsageError: the folder contains something other than this study.
        RecipeError: the recipes differ in keys that are not the method's own, or a budget cannot be
            met.
        InterruptedRunError: the user pressed Ctrl-C; finished runs are kept.
    """
    with folder.held(overwrite=overwrite, tell=tell):
        kept = None if overwrite else folder.record()
        study = solve(study, kept)
        engine = make_engine(study.study.engine, folder.path, jobs=jobs, quiet=quiet)
        try:
            runs = Runs(engine, tell)
            return _Coordinator(study, folder, runs, command, kept, tell, saved).run(overwrite)
        finally:
            engine.close()


class _Coordinator:
    """Run one study in its locked folder."""

    def __init__(
        self,
        study: LoadedStudy,
        folder: StudyFolder,
        runs: Runs,
        command: str,
        kept: StudyRecord | None,
        tell: Tell,
        saved: Callable[[StudyRecord], None],
    ) -> None:
        self._study, self._folder, self._runs, self._kept = study, folder, runs, kept
        self._tell, self._saved = tell, saved
        self._lock = threading.Lock()
        self._tuning = self._make_tuning()
        self._cells = {_key(cell): cell for cell in study.cells}  # with tuned settings once known
        self._record = StudyRecord(
            name=study.study.name,
            digest=study_digest(study),
            command=command,
            started=now(),
            match=study.study.match,
            budget=study.budget,
            parity=check_parity(study),
            engine=study.study.engine.name,
            jobs=runs.engine.jobs,
            methods=list(dict.fromkeys(cell.label for cell in study.cells)),
            tasks=list(dict.fromkeys(cell.task for cell in study.cells)),
            seeds=list(study.study.seeds),
            figures=[PublishedFigure(**figure.model_dump()) for figure in study.study.figures],
            environment=collect(),
            git=git_state(Path.cwd()),
            cells=[],
        )

    def run(self, overwrite: bool) -> StudyRecord:
        """Tune, train, and write the record until the study ends."""
        self._folder.begin(self._as_tuned_before, overwrite=overwrite)
        if self._tuning is not None:
            self._tuning.open(make=True)
            self._tuning.retry()
        self._save()
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            if self._tuning is not None:
                self._runs.run_all(self._tuning.work())
                tuned = self._tuning.tuned()
                assert tuned is not None  # all series have ended
                self._cells = {_key(cell): cell for cell in tuned.cells}
                self._record = self._record.changed(parity=check_parity(tuned))
            self._runs.run_all(self._work())
            bad = any(entry.status != "done" for entry in self._entries())
            return self._write("failed" if bad else "done")
        except (KeyboardInterrupt, InterruptedRunError) as stopped:
            self._write("interrupted")
            why = f"{stopped.what}: " if isinstance(stopped, InterruptedRunError) else ""
            raise InterruptedRunError(
                f"{why}the study was stopped; finished runs are kept",
                where=str(self._folder.path),
                fix="run the same command again to continue",
            ) from None
        finally:
            signal.signal(signal.SIGTERM, before)

    def _make_tuning(self) -> Tuning | None:
        if self._study.study.tune is None:
            return None
        from sparsegrad_cli.study.tuning import Tuning

        return Tuning(self._study, self._folder, self._runs, self._tell, self._save)

    def _as_tuned_before(self) -> LoadedStudy:
        """Return the study with the tuned settings if tuning has already ended; else as written."""
        if self._tuning is None or not self._tuning.open(make=False):
            return self._study
        return self._tuning.tuned() or self._study

    def _work(self) -> list[Callable[[], None]]:
        """Return one function for each run that has settings; it skips a finished run."""
        work: list[Callable[[], None]] = []
        for at, asked in enumerate(self._study.cells, 1):
            cell = self._cells.get(_key(asked))
            if cell is not None:
                where = f"[{at}/{len(self._study.cells)}]"
                name = f"{where} {cell.task}  {cell.label}  seed {cell.seed}"
                work.append(partial(self._run_cell, name, cell))
        return work

    def _run_cell(self, name: str, cell: Cell) -> None:
        folder = self._folder.cell(cell)
        self._runs.wait_for_owner(folder)
        if self._tuning is not None and not is_done(cell.loaded.recipe, folder):
            self._tuning.adopt(cell, folder)
        if is_done(cell.loaded.recipe, folder):
            self._tell(f"{name}: done before")
            return
        self._tell(name)
        self._runs.train(cell.loaded.recipe, folder, started=self._save)
        self._save()

    def _save(self) -> None:
        self._write("running")

    def _write(self, status: str) -> StudyRecord:
        """Write compare.json from the records in the runs' folders, and pass it to ``saved``."""
        with self._lock:
            entries = self._entries()
            budget = self._study.budget
            self._record = self._record.changed(
                status=status,
                finished=self._finished(status),
                budget=None if budget is None else with_measured(budget, entries),
                tuning=None if self._tuning is None else self._tuning.block(),
                cells=entries,
                **evidence(entries, self._study.study.test, self._folder.path),
            )
            write(self._record, self._folder.record_file)
            self._saved(self._record)
            return self._record

    def _finished(self, status: str) -> str | None:
        """Return the time; for a study that had already finished, the time recorded then."""
        if status == "running":
            return None
        kept = self._kept
        same = kept is not None and (kept.digest, kept.status) == (self._record.digest, status)
        return kept.finished if kept is not None and same else now()

    def _entries(self) -> list[CellEntry]:
        return [self._entry(cell) for cell in self._study.cells]

    def _entry(self, cell: Cell) -> CellEntry:
        folder = self._folder.cell(cell)
        run = find_run(folder)
        status: CellStatus = run.status if run else "pending"
        if status in ("pending", "running"):
            # A run recorded as running whose folder no process has locked was killed.
            idle: CellStatus = "interrupted" if run else "pending"
            status = "running" if self._runs.is_active(folder) else idle
        error = run.error if run else None
        if _key(cell) not in self._cells:
            status, error = "failed", _UNTUNED
        return CellEntry(
            task=cell.task,
            method=cell.label,
            seed=cell.seed,
            run_dir=str(folder.relative_to(self._folder.path)),
            status=status,
            error=error,
            run=_without_plots(run) if run else None,
        )


def _without_plots(run: RunRecord) -> RunRecord:
    if run.calibration is None:
        return run
    plain = run.calibration.to_json()
    kept = {key: value for key, value in plain.items() if key not in ("heat_map", "spectra")}
    return run.changed(calibration=kept)


def _key(cell: Cell) -> tuple[str, str, int]:
    return cell.task, cell.label, cell.seed


def plan_of(study: LoadedStudy) -> PlanRecord:
    """Return what ``compare --dry-run`` shows: the study before tuning.

    Raises:
        RecipeError: the recipes differ in keys that neither the method nor the budget sets.
    """
    first = study.study.seeds[0]
    return PlanRecord(
        name=study.study.name,
        match=study.study.match,
        seeds=list(study.study.seeds),
        cells=len(study.cells),
        trials=study.study.tune.trials if study.study.tune is not None else None,
        own_seeds=study.study.tune is not None and study.study.tune.own,
        parity=check_parity(study),
        budget=study.budget,
        rows=[
            PlanRow(task=cell.task, method=cell.label, recipe=to_plain(cell.loaded.recipe))
            for cell in study.cells
            if cell.seed == first
        ],
    )
