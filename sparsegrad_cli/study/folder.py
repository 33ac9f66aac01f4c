"""The folder of a comparison: what may be begun in it, and that several processes may work there.

Two locks: one is held, shared, by every process that works there and by the runs it started, so
that the folder is alone's who gets it for itself; the other, for a moment, by whoever reads and
writes the ledger.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparsegrad_cli.errors import DiskError, UsageError
from sparsegrad_cli.io.paths import exists, is_folder, make_folder, refuse_link, remove_folder
from sparsegrad_cli.recipe.load_recipe import digest
from sparsegrad_cli.recipe.study import Cell, LoadedStudy
from sparsegrad_cli.records.store import REPORTS, load_record, torn_writes
from sparsegrad_cli.report.access import mappings, text
from sparsegrad_cli.study.claims import FileLock

LEDGER = "compare.json"
_AT_WORK, _WRITING, SOLVING = ".at-work.lock", ".ledger.lock", ".solving.claim"
TUNING, TRIALS = "tuning.db", "tuning"
_FOLDERS = ("cells", "answers", TRIALS)
_DATABASE = (TUNING, f"{TUNING}-journal")
_FILES = (*_DATABASE, *REPORTS, LEDGER)  # the one by which it is ours goes last
_BEFORE_LEDGER = {"cells", _AT_WORK, _WRITING, SOLVING, *_DATABASE}


class StudyFolder:
    """Where a comparison lives.

    Args:
        path: the folder; made by :meth:`enter`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._at_work: FileLock | None = None

    def cell(self, cell: Cell) -> Path:
        """The run directory of a cell."""
        return self.path / "cells" / safe_name(f"{cell.task}-{cell.label}-s{cell.seed}")

    def refuse_links(self, study: LoadedStudy) -> None:
        """Of what is written to, nothing may lie elsewhere, nor a file where runs would.

        Raises:
            UsageError: a folder in it is a link or a file.
        """
        folders = [refuse_link(self.cell(cell), self.path) for cell in study.cells]
        if study.study.tune is not None:
            folders.append(self.path / TRIALS)
        for folder in folders:
            if exists(folder) and not is_folder(folder):
                raise UsageError(f"{folder} is a file, not a folder", where="output_dir")
        for name in (TRIALS, *_DATABASE):
            refuse_link(self.path / name, self.path)

    def trial(self, name: str) -> Path:
        """The run directory of a run of tuning."""
        return self.path / TRIALS / safe_name(name)

    @contextmanager
    def ledger(self) -> Iterator[None]:
        """Inside, nobody else reads to write, enters or leaves."""
        with FileLock(self.path / _WRITING) as lock:
            lock.take(wait=True)
            yield

    @property
    def presence(self) -> list[FileLock]:
        """What a run has to hold for the folder to be at work as long as it lives."""
        return [self._at_work] if self._at_work else []

    def prepare(self, *, overwrite: bool) -> None:
        """Make the folder, unless something else is in it.

        Raises:
            UsageError: it holds foreign files, and there is no ``overwrite``; or it is a file.
            DiskError: it cannot be made.
        """
        if exists(self.path) and not is_folder(self.path):
            raise UsageError(f"{self.path} is a file, not a folder", where="output_dir")
        if not overwrite and self._is_foreign():
            raise _refused(f"the folder {self.path} is not empty")
        try:
            make_folder(self.path / "cells")
        except OSError as error:
            raise DiskError(
                f"the folder {self.path} cannot be written: {error.strerror or error}",
                where="output_dir",
                fix="check its permissions, or name another --output-dir",
            ) from error

    def _is_foreign(self) -> bool:
        """Something is in it, and not what a comparison leaves, however soon it was killed."""
        if not self._looks_foreign():
            return False
        lock = self.path / _WRITING
        if lock.is_symlink() or not lock.is_file():
            return True
        with self.ledger():  # what looked so was perhaps another's first or new beginning
            return self._looks_foreign()

    def _looks_foreign(self) -> bool:
        there = {path.name for path in self.path.iterdir()} if is_folder(self.path) else set()
        if LEDGER in there or not there:
            return False
        torn = {path.name for path in torn_writes(self.path / LEDGER)}
        return not there <= _BEFORE_LEDGER | torn or any(self.path.glob("cells/*"))

    def enter(
        self, study: Callable[[], LoadedStudy], identity: str, *, overwrite: bool
    ) -> dict[str, Any] | None:
        """Begin to work here, or join those who do; the ledger must be held.

        Alone, a comparison may grow by methods, tasks and seeds, and cells that are not done may
        change: what is done there has to be part of this study just as it is. Together, the studies
        are the same.

        Args:
            study: makes what is to be done, with the settings that tuning found, if it has ended.
            identity: the digest of what was asked for.
            overwrite: forget what is done there.

        Returns:
            The ledger of those who are at work; None where nobody is.

        Raises:
            UsageError: another comparison is done, or at work, or somebody is and ``overwrite``.
        """
        lock = FileLock(self.path / _AT_WORK)
        try:
            record = None
            if not lock.take():
                record = self._joined(identity, overwrite)
            elif overwrite:
                self._forget()
            else:
                if (self.path / LEDGER).is_file():
                    self._check_done(study())
                self._forget_torn()
            lock.take(shared=True)  # of those at work nobody locks more, and others wait for us
        except BaseException:
            lock.close()
            raise
        self._at_work = lock
        return record

    def leave(self) -> bool:
        """Work here no more; whether nobody else does (who holds the ledger can be sure of it)."""
        if self._at_work is None:
            return False
        self._at_work.let_go()
        alone = self._at_work.take()
        self._at_work.close()
        self._at_work = None
        return alone

    def _joined(self, identity: str, overwrite: bool) -> dict[str, Any]:
        wait = "wait for it to end, stop it, or name another --output-dir"
        if overwrite:
            what = f"another process is at work in {self.path}: nothing can be overwritten"
            raise UsageError(what, where="--overwrite", fix=f"{wait}; without it, work is shared")
        record = load_record(self.path / LEDGER)
        if record.get("digest") != identity:
            what = f"another process is at work in {self.path}, on another comparison"
            raise UsageError(what, where="output_dir", fix=wait)
        return record

    def _forget(self) -> None:
        """Remove what a comparison leaves, links to elsewhere without what they name."""
        try:
            for name in _FOLDERS:
                remove_folder(self.path / name)
            for name in _FILES:
                (self.path / name).unlink(missing_ok=True)
            self._forget_torn()
            (self.path / "cells").mkdir()
        except OSError as error:
            what = f"{self.path} cannot be cleared: {error}"
            raise UsageError(what, where="output_dir") from error

    def _forget_torn(self) -> None:
        for left in torn_writes(self.path / LEDGER):
            left.unlink(missing_ok=True)

    def _check_done(self, study: LoadedStudy) -> None:
        strange = _strangers(study, load_record(self.path / LEDGER))
        if not strange:
            return
        raise _refused(
            f"{self.path} holds another comparison: done there and not part of this one, or with "
            f"other settings, {'is' if len(strange) == 1 else 'are'} {', '.join(strange[:3])}"
            f"{f' and {len(strange) - 3} more' if len(strange) > 3 else ''}"
        )


def _refused(what: str) -> UsageError:
    return UsageError(what, where="output_dir", fix="--overwrite, or another --output-dir")


def _strangers(study: LoadedStudy, record: dict[str, Any]) -> list[str]:
    """Finished cells of a record that the study does not have, or not with these settings."""
    here = {(c.task, c.label, str(c.seed)): digest(c.loaded.recipe) for c in study.cells}
    strange = []
    for cell in mappings(record, "cells"):
        task, method, seed = (text(cell, key) or "?" for key in ("task", "method", "seed"))
        wanted = here.get((task, method, seed))
        known = wanted is not None and wanted == text(cell, "run", "recipe_digest")
        if text(cell, "status") == "done" and not known:
            strange.append(f"{task} {method} seed {seed}")
    return strange


def study_digest(study: LoadedStudy) -> str:
    """sha256 (hex) of all cells, and of how they are tuned: what a comparison is."""
    cells: list[Any] = [
        [cell.task, cell.label, cell.seed, digest(cell.loaded.recipe)] for cell in study.cells
    ]
    if study.study.tune is not None:
        cells.append(study.study.tune.model_dump(mode="json"))
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()


def safe_name(text: str) -> str:
    """A folder name of letters, digits, dots and dashes, of one part, that begins with no dot."""
    return re.sub(r"[^\w.+-]+", "-", text)[:200].lstrip(".") or "-"
