"""Run the cells of a study one by one, each in its own process, and keep the ledger.

A process per cell: memory that one method leaves behind cannot burden the next, and a cell that
is killed for memory takes nothing else with it. compare.json is written after every cell, so an
interrupted comparison goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from sparsegrad_cli.compare.evidence import evidence
from sparsegrad_cli.compare.folder import cell_dir
from sparsegrad_cli.compare.parity import check_parity
from sparsegrad_cli.errors import DiskError, FileFormatError, InterruptedRunError, UsageError
from sparsegrad_cli.measure.environment import collect, git_state
from sparsegrad_cli.recipe.loading import digest, to_plain
from sparsegrad_cli.recipe.study import Cell, LoadedStudy
from sparsegrad_cli.recipe.yaml_text import dump
from sparsegrad_cli.report.records import load_record, write_json_atomic, write_text_atomic
from sparsegrad_cli.report.words import status_of
from sparsegrad_cli.rundir import now

SCHEMA = 1
_EXIT_STATUS = {1: "failed", 2: "failed", 3: "out_of_memory", 130: "interrupted"}


class Comparison:
    """One comparison in one directory.

    Args:
        study: the checked study.
        folder: where it lives; cells in ``cells/``.
        command: how it was started, for the record.
        tell: called with a line before each cell.
        quiet: cells show no progress.
        jobs: cells that run at once; the cores are shared out among them.
        saved: called with the record each time compare.json was written, one call at a time.

    Raises:
        RecipeError: the methods of the study differ in more than themselves.
    """

    def __init__(
        self,
        study: LoadedStudy,
        folder: Path,
        *,
        command: str,
        tell: Callable[[str], None] = lambda line: None,
        quiet: bool = False,
        jobs: int = 1,
        saved: Callable[[dict[str, Any]], None] = lambda record: None,
    ) -> None:
        self.study, self.folder = study, folder
        self._saved = saved
        self._tell, self._quiet, self._jobs = tell, quiet or jobs > 1, jobs
        self._lock = threading.Lock()
        self._running: dict[Path, subprocess.Popen[bytes]] = {}
        self.record: dict[str, Any] = {
            "schema": SCHEMA,
            "name": study.study.name,
            "digest": study_digest(study),
            "status": "running",
            "command": command,
            "started": now(),
            "finished": None,
            "match": study.study.match,
            "parity": check_parity(study),
            "jobs": jobs,
            "methods": list(dict.fromkeys(cell.label for cell in study.cells)),
            "tasks": list(dict.fromkeys(cell.task for cell in study.cells)),
            "seeds": list(study.study.seeds),
            "figures": [figure.model_dump() for figure in study.study.figures],
            "environment": collect(),
            "git": git_state(Path.cwd()),
        }

    def run(self) -> dict[str, Any]:
        """Run what is not done yet.

        Returns:
            The content of compare.json.

        Raises:
            InterruptedRunError: the user pressed Ctrl-C; finished cells are kept.
            DiskError: the folder cannot be written.
        """
        try:
            (self.folder / "cells").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            what = f"{self.folder} cannot be written: {error.strerror or error}"
            raise DiskError(what, where="output_dir", fix="name another --output-dir") from error
        pool = ThreadPoolExecutor(self._jobs)
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            futures = [
                pool.submit(self._visit, number, cell)
                for number, cell in enumerate(self.study.cells, 1)
            ]
            for future in as_completed(futures):
                future.result()
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            self._stop_cells()
            pool.shutdown(wait=True)
            self._save("interrupted")
            raise InterruptedRunError(
                "the comparison was stopped; finished cells are kept",
                where=str(self.folder),
                fix="the same command goes on where it stopped",
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            signal.signal(signal.SIGTERM, before)
        bad = any(c["status"] != "done" for c in self._ledger())
        self._save("failed" if bad else "done")
        return self.record

    def _visit(self, number: int, cell: Cell) -> None:
        """Run one cell unless it is done; write the ledger before and after."""
        name = f"[{number}/{len(self.study.cells)}] {cell.task}  {cell.label}  seed {cell.seed}"
        if self._done(cell):
            self._tell(f"{name}: done before")
            return
        self._tell(name)
        self._run_cell(cell)
        self._save("running")

    def _stop_cells(self) -> None:
        """Pass Ctrl-C on, give the cells time to save, then insist."""
        for process in list(self._running.values()):
            try:
                process.send_signal(signal.SIGINT)
                process.wait(timeout=120)
            except (subprocess.TimeoutExpired, KeyboardInterrupt):
                process.kill()
                process.wait()

    def _save(self, status: str) -> None:
        with self._lock:
            cells = self._ledger()
            self.record.update(
                status=status,
                finished=None if status == "running" else now(),
                cells=cells,
                **evidence(cells),
            )
            write_json_atomic(self.folder / "compare.json", self.record)
            self._saved(self.record)

    def _ledger(self) -> list[dict[str, Any]]:
        return [
            self._entry(cell, self._cell_dir(cell) in self._running) for cell in self.study.cells
        ]

    def _entry(self, cell: Cell, is_running: bool) -> dict[str, Any]:
        run = self._run_of(cell)
        status = status_of(run) if run else "pending"
        error = run.get("error") if run else None
        if status == "running" and not is_running:
            # Nobody is running it: this process was killed together with it.
            status = "interrupted"
        slim = None
        if run:
            slim = dict(run)
            calibration = slim.get("calibration")
            if isinstance(calibration, dict):
                dropped = ("heat_map", "spectra")
                slim["calibration"] = {k: v for k, v in calibration.items() if k not in dropped}
        return {
            "task": cell.task,
            "method": cell.label,
            "seed": cell.seed,
            "run_dir": str(self._cell_dir(cell).relative_to(self.folder)),
            "status": status,
            "error": error,
            "run": slim,
        }

    def _cell_dir(self, cell: Cell) -> Path:
        return cell_dir(self.folder, cell)

    def _run_of(self, cell: Cell) -> dict[str, Any] | None:
        try:
            return load_record(self._cell_dir(cell))
        except (FileFormatError, UsageError, OSError):
            return None

    def _done(self, cell: Cell) -> bool:
        run = self._run_of(cell)
        if not run or status_of(run) != "done":
            return False
        return run.get("recipe_digest") == digest(cell.loaded.recipe)

    def _run_cell(self, cell: Cell) -> None:
        folder = self._cell_dir(cell)
        plain = {**to_plain(cell.loaded.recipe), "output_dir": str(folder)}
        recipe = folder.with_name(folder.name + ".yaml")  # a label may hold a dot: 2.5e-4
        write_text_atomic(recipe, dump(plain))
        run = self._run_of(cell)
        same = run is not None and run.get("recipe_digest") == digest(cell.loaded.recipe)
        mode = "--resume" if same and any(folder.glob("checkpoint-*/state.json")) else "--overwrite"
        command = [sys.executable, "-m", "sparsegrad_cli", "train", str(recipe), mode]
        if self._quiet:
            command.append("--quiet")
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL if self._quiet else None,
            env=os.environ | self._environment(),
            # The terminal's Ctrl-C reaches us alone; we pass it on, once.
            start_new_session=True,
        )
        self._running[folder] = process
        self._save("running")
        code = process.wait()
        del self._running[folder]
        self._note_exit(folder, code)

    def _environment(self) -> dict[str, str]:
        if self._jobs == 1:
            return {}
        return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self._jobs))}

    def _note_exit(self, folder: Path, code: int) -> None:
        """A cell that died without writing its status gets one here."""
        if code == 130:  # it has written so itself
            return
        try:
            run = load_record(folder)
        except (FileFormatError, UsageError, OSError):
            run = {"schema": SCHEMA, "status": "running", "recipe_digest": None}
        if code == 0 or status_of(run) in ("failed", "out_of_memory", "interrupted"):
            return
        killed = code == -signal.SIGKILL
        run["status"] = "out_of_memory" if killed else _EXIT_STATUS.get(code, "failed")
        what = "killed by the system, most likely for memory" if killed else f"ended with {code}"
        run["error"] = {"title": "Cell", "what": what, "where": str(folder), "fix": None}
        folder.mkdir(parents=True, exist_ok=True)
        write_json_atomic(folder / "run.json", run)


def study_digest(study: LoadedStudy) -> str:
    """sha256 (hex) of all cells: what a comparison is."""
    cells = [[cell.task, cell.label, cell.seed, digest(cell.loaded.recipe)] for cell in study.cells]
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()
