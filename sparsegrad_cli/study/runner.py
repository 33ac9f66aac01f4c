"""Run the cells of a study, each in its own process, and keep the ledger.

compare.json is written before and after every cell, so that an interrupted comparison goes on where
it stopped. Several processes may work on one comparison: each cell is claimed by one of them. Where
the study is tuned, that comes first, and the cells run with the best settings found.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsegrad_cli.errors import InterruptedRunError, SparsegradError
from sparsegrad_cli.recipe.load_recipe import digest
from sparsegrad_cli.recipe.study import Cell, LoadedStudy
from sparsegrad_cli.records.base import now
from sparsegrad_cli.records.environment import collect, git_state
from sparsegrad_cli.records.store import SCHEMA, load_record, write_json_atomic
from sparsegrad_cli.report.labels import status_of
from sparsegrad_cli.study.budget_report import with_measured
from sparsegrad_cli.study.claims import Claim
from sparsegrad_cli.study.entries import claim_of, entry_of, stamp
from sparsegrad_cli.study.evidence import evidence
from sparsegrad_cli.study.folder import LEDGER, StudyFolder, study_digest
from sparsegrad_cli.study.jobs import Job, work_off
from sparsegrad_cli.study.parity import check_parity
from sparsegrad_cli.study.worker_pool import Crew, run_in

if TYPE_CHECKING:
    from sparsegrad_cli.study.tuning import Tuning

_OF_THE_FIRST = ("command", "started", "jobs", "environment", "git")
_ENDED = ("failed", "out_of_memory")


class Comparison:
    """One comparison in one directory, by this process and perhaps others.

    Args:
        study: the checked study, its budget solved.
        folder: where it lives; cells in ``cells/``.
        command: how it was started, for the record.
        overwrite: forget what is done there.
        tell: called with a line before each cell.
        quiet: cells show no progress.
        jobs: cells that run at once; the cores are shared out among them.
        saved: called with the record each time compare.json was written, one call at a time.
        begun: called once compare.json says what is done here.

    Raises:
        RecipeError: the methods of the study differ in more than themselves.
    """

    def __init__(
        self,
        study: LoadedStudy,
        folder: Path,
        *,
        command: str,
        overwrite: bool = False,
        tell: Callable[[str], None] = lambda line: None,
        quiet: bool = False,
        jobs: int = 1,
        saved: Callable[[dict[str, Any]], None] = lambda record: None,
        begun: Callable[[], None] = lambda: None,
    ) -> None:
        self.study = study
        self._place, self._overwrite = StudyFolder(folder), overwrite
        self._tell, self._saved, self._begun = tell, saved, begun
        self._jobs, self._crew = jobs, Crew(quiet=quiet, jobs=jobs)
        self._before: dict[Path, Any] = {}
        self._tuning = self._make_tuning()
        self._cells = {_key(cell): cell for cell in study.cells}  # as they are to run
        self.record: dict[str, Any] = {
            "schema": SCHEMA,
            "name": study.study.name,
            "digest": study_digest(study),
            "status": "running",
            "command": command,
            "started": now(),
            "finished": None,
            "match": study.study.match,
            "budget": study.budget,
            "parity": check_parity(study),
            "jobs": jobs,
            "methods": list(dict.fromkeys(cell.label for cell in study.cells)),
            "tasks": list(dict.fromkeys(cell.task for cell in study.cells)),
            "seeds": list(study.study.seeds),
            "figures": [figure.model_dump() for figure in study.study.figures],
            "environment": collect().to_json(),
            "git": git_state(Path.cwd()).to_json(),
        }

    def run(self) -> dict[str, Any]:
        """Run what is not done yet, and wait for what others run.

        Returns:
            The content of compare.json.

        Raises:
            UsageError: the folder holds something else, or others are at work on something else.
            InterruptedRunError: the user pressed Ctrl-C; finished cells are kept.
        """
        try:
            self._begin()
            return self._run()
        finally:
            self._place.leave()
            if self._tuning is not None:
                self._tuning.close()

    def _run(self) -> dict[str, Any]:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            if self._tuning is not None:
                work_off(self._tuning.jobs(), self._jobs, self._tell, self._crew)
                self._adopt(self._tuning)
            self._run_cells()
            bad = any(entry["status"] != "done" for entry in self._ledger())
            self._end("failed" if bad else "done")
        except (KeyboardInterrupt, InterruptedRunError) as stopped:
            self._end("interrupted")
            what = "the comparison was stopped; finished cells are kept"
            raise InterruptedRunError(
                f"{stopped.what}: {what}" if isinstance(stopped, InterruptedRunError) else what,
                where=str(self._place.path),
                fix="the same command goes on where it stopped",
            ) from None
        finally:
            signal.signal(signal.SIGTERM, before)
        return self.record

    def _make_tuning(self) -> Tuning | None:
        if self.study.study.tune is None:
            return None
        from sparsegrad_cli.study.tuning import Tuning

        return Tuning(self.study, self._place, self._crew, self._tell, self._save)

    def _found_before(self) -> LoadedStudy:
        """The study as it is to run, as far as is known before anything does."""
        if self._tuning is None or not self._tuning.connect(make=False):
            return self.study
        return self._tuning.tuned() or self.study

    def _adopt(self, tuning: Tuning) -> None:
        """From here on, cells run with the best settings; those without any do not run."""
        tuned = tuning.tuned()
        assert tuned is not None  # all series have ended
        self._cells = {_key(cell): cell for cell in tuned.cells}
        self.record["parity"] = check_parity(tuned)

    def _begin(self) -> None:
        """Enter the folder; to those who are at work there, this is one more of them."""
        self._place.prepare(overwrite=self._overwrite)
        with self._place.ledger():
            there = self._place.enter(
                self._found_before, self.record["digest"], overwrite=self._overwrite
            )
            self._place.refuse_links(self.study)
            if self._tuning is not None:
                self._tuning.connect(make=True)
                if there is None:
                    self._tuning.retry()
            if there is not None:
                self.record.update({key: there.get(key) for key in _OF_THE_FIRST})
                self._tell("others are at work on this comparison: their cells are passed over")
            self._before = {
                folder: stamp(folder) for folder in map(self._place.cell, self.study.cells)
            }
            self._write("running")
        self._begun()

    def _end(self, status: str) -> None:
        """Write the last word, unless we are stopped and others go on."""
        with self._place.ledger():
            alone = self._place.leave()
            goes_on = status == "interrupted" and not alone
            self._write("running" if goes_on else status)

    def _run_cells(self) -> None:
        jobs = []
        for number, asked in enumerate(self.study.cells, 1):
            cell = self._cells.get(_key(asked))
            if cell is None:
                continue
            name = f"[{number}/{len(self.study.cells)}] {cell.task}  {cell.label}  seed {cell.seed}"
            jobs.append(
                Job(
                    name,
                    claim_of(self._place.cell(cell)),
                    lambda cell=cell: self._settled(cell),  # type: ignore[misc]
                    lambda held, cell=cell: self._run_cell(cell, held),  # type: ignore[misc]
                )
            )
        work_off(jobs, self._jobs, self._tell, self._crew)

    def _settled(self, cell: Cell) -> bool:
        """Done, or another process has tried it since we began: broken ones are run again once."""
        folder = self._place.cell(cell)
        run = run_in(folder)
        if run is None or run.get("recipe_digest") != digest(cell.loaded.recipe):
            return False
        tried = status_of(run) in _ENDED and stamp(folder) != self._before.get(folder)
        return status_of(run) == "done" or tried

    def _run_cell(self, cell: Cell, held: Claim) -> None:
        folder = self._place.cell(cell)
        process = self._crew.start(cell.loaded.recipe, folder, [held, *self._place.presence])
        if process is None:
            return
        self._save()
        self._crew.wait(process, folder)
        self._save()  # before the claim is given back: who waits for it has the last word

    def _save(self) -> None:
        with self._place.ledger():
            self._write("running")

    def _write(self, status: str) -> None:
        """The ledger anew, as the cells' folders say; it must be held."""
        cells = self._ledger()
        self.record.update(
            status=status,
            finished=None if status == "running" else self._finished(status),
            tuning=self._tuning.block() if self._tuning is not None else None,
            cells=cells,
            **evidence(cells),
        )
        if self.study.budget is not None:
            self.record["budget"] = with_measured(self.study.budget, cells)
        write_json_atomic(self._place.path / LEDGER, self.record)
        self._saved(self.record)

    def _finished(self, status: str) -> Any:
        """Now, unless another process has said so before: it is one comparison."""
        try:
            there = load_record(self._place.path / LEDGER)
        except SparsegradError:
            return now()
        same = there.get("digest") == self.record["digest"] and there.get("status") == status
        return there.get("finished") if same else now()

    def _ledger(self) -> list[dict[str, Any]]:
        return [
            entry_of(cell, self._place, tuned=_key(cell) in self._cells)
            for cell in self.study.cells
        ]


def _key(cell: Cell) -> tuple[str, str, int]:
    return cell.task, cell.label, cell.seed
