"""Lock the folder of a study for one coordinator, and check which study may run in it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sparsegrad_cli.errors import DiskError, UsageError
from sparsegrad_cli.io.atomic import torn_writes
from sparsegrad_cli.io.locks import NAME as LOCK
from sparsegrad_cli.io.locks import FolderLock
from sparsegrad_cli.io.paths import (
    exists,
    is_file,
    is_folder,
    make_folder,
    refuse_link,
    remove_folder,
)
from sparsegrad_cli.recipe.load_recipe import digest
from sparsegrad_cli.recipe.study import Cell, LoadedStudy
from sparsegrad_cli.records.store import REPORTS, STUDY, load_study
from sparsegrad_cli.records.study import StudyRecord

TUNING, TRIALS = "tuning.journal", "tuning"
TUNING_BEFORE = "tuning.db"  # written by versions that kept trials in SQLite
_RUNS = "cells"
SLURM = "slurm"  # the folder of Slurm's logs and job files
_FOLDERS = (_RUNS, "answers", TRIALS, SLURM)
_JOURNAL = (TUNING, f"{TUNING}.lock")
# compare.json marks the folder as a study's, so it is removed last.
_FILES = (*_JOURNAL, TUNING_BEFORE, *REPORTS, STUDY)
_BEFORE_RECORD = {LOCK, _RUNS, SLURM, *_JOURNAL}


class StudyFolder:
    """The folder of a study: compare.json, the folders of its runs, and its reports."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def record_file(self) -> Path:
        """The path of compare.json."""
        return self.path / STUDY

    def cell(self, cell: Cell) -> Path:
        """Return the folder of a run."""
        return self.path / _RUNS / safe_name(f"{cell.task}-{cell.label}-s{cell.seed}")

    def trial(self, name: str) -> Path:
        """Return the folder of a tuning run."""
        return self.path / TRIALS / safe_name(name)

    def record(self) -> StudyRecord | None:
        """Return the content of compare.json; None if there is none.

        Raises:
            FileFormatError: compare.json is damaged.
        """
        return load_study(self.record_file) if is_file(self.record_file) else None

    @contextmanager
    def held(
        self, *, overwrite: bool, tell: Callable[[str], None] = lambda note: None
    ) -> Iterator[None]:
        """Lock the folder for this process. It is made if missing, and removed if left empty.

        Args:
            overwrite: accept a folder that contains something other than a study.
            tell: called with a note if the file system has no locks.

        Raises:
            BusyError: another process has locked the folder; the message names it.
            UsageError: the path is a file, or the folder contains something other than a study and
                ``overwrite`` is False.
            DiskError: the folder cannot be written.
        """
        if exists(self.path) and not is_folder(self.path):
            raise UsageError(f"{self.path} is a file, not a folder", where="output_dir")
        made = not exists(self.path)
        self._make(self.path)
        try:
            with FolderLock(self.path, tell=tell):
                if not overwrite and self._is_foreign():
                    raise _refused(f"the folder {self.path} is not empty")
                yield
        finally:
            if made:
                with suppress(OSError):  # fails if the folder is not empty
                    self.path.rmdir()

    def begin(self, study: Callable[[], LoadedStudy], *, overwrite: bool) -> None:
        """Check that a study may run in the locked folder, or remove what an earlier one left.

        A study may grow by methods, tasks and seeds, and unfinished runs may change. Finished runs
        must be part of this study with the same settings.

        Args:
            study: returns the study, with the settings that tuning found if it has ended.
            overwrite: remove the results of the earlier study.

        Raises:
            UsageError: the folder has finished runs of another study, or a folder in it is a link
                or a file.
            FileFormatError: compare.json is damaged.
        """
        for left in torn_writes(self.record_file):
            left.unlink(missing_ok=True)
        if overwrite:
            self._forget()
        elif (record := self.record()) is not None:
            self._check_done(study(), record)
        self._refuse_links(study())
        self._make(self.path / _RUNS)

    def _refuse_links(self, study: LoadedStudy) -> None:
        """Refuse links in places that are written to, and files in the place of folders.

        Raises:
            UsageError: there is such a link or file; the message names it.
        """
        folders = [refuse_link(self.cell(cell), self.path) for cell in study.cells]
        folders += [self.path / SLURM]
        if study.study.tune is not None:
            folders.append(self.path / TRIALS)
        for folder in folders:
            if exists(folder) and not is_folder(folder):
                raise UsageError(f"{folder} is a file, not a folder", where="output_dir")
        for name in (TRIALS, SLURM, *_JOURNAL):
            refuse_link(self.path / name, self.path)

    def _make(self, folder: Path) -> None:
        try:
            make_folder(folder)
        except OSError as error:
            raise DiskError(
                f"the folder {folder} cannot be written: {error.strerror or error}",
                where="output_dir",
                fix="check its permissions, or name another --output-dir",
            ) from error

    def _is_foreign(self) -> bool:
        """Return whether the folder contains something that even a killed study does not leave."""
        there = {path.name for path in self.path.iterdir()}
        if STUDY in there:
            return False
        torn = {path.name for path in torn_writes(self.record_file)}
        return not there <= _BEFORE_RECORD | torn or any(self.path.glob(f"{_RUNS}/*"))

    def _forget(self) -> None:
        """Remove the files of a study. Of links to other places, remove only the link."""
        try:
            for name in _FOLDERS:
                remove_folder(self.path / name)
            for name in _FILES:
                (self.path / name).unlink(missing_ok=True)
        except OSError as error:
            what = f"{self.path} cannot be cleared: {error}"
            raise UsageError(what, where="output_dir") from error

    def _check_done(self, study: LoadedStudy, record: StudyRecord) -> None:
        here = {(c.task, c.label, c.seed): digest(c.loaded.recipe) for c in study.cells}
        strange = [
            f"{cell.task} {cell.method} seed {cell.seed}"
            for cell in record.cells
            if cell.status == "done"
            and (
                cell.run is None
                or here.get((cell.task, cell.method, cell.seed)) != cell.run.recipe_digest
            )
        ]
        if strange:
            more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
            raise _refused(
                f"{self.path} holds another study: these finished runs are not part of this one, "
                f"or have other settings: {', '.join(strange[:3])}{more}"
            )


def _refused(what: str) -> UsageError:
    return UsageError(what, where="output_dir", fix="--overwrite, or another --output-dir")


def study_digest(study: LoadedStudy) -> str:
    """Return the sha256 (hex) over all recipes and the tuning section, which identifies a study."""
    cells: list[object] = [
        [cell.task, cell.label, cell.seed, digest(cell.loaded.recipe)] for cell in study.cells
    ]
    if study.study.tune is not None:
        cells.append(study.study.tune.model_dump(mode="json"))
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()


def safe_name(text: str) -> str:
    """Return a folder name of letters, digits, dots and dashes that does not start with a dot."""
    return re.sub(r"[^\w.+-]+", "-", text)[:200].lstrip(".") or "-"
