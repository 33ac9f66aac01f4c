"""Start, resume, stop and find the runs of a study."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

from sparsegrad_cli.errors import FileFormatError, UsageError
from sparsegrad_cli.io.atomic import write_text_atomic
from sparsegrad_cli.io.locks import FolderLock, owner_of
from sparsegrad_cli.io.paths import make_folder
from sparsegrad_cli.recipe.load_recipe import LoadedRecipe, digest, to_plain
from sparsegrad_cli.recipe.schema import Recipe
from sparsegrad_cli.recipe.yaml_source import dump
from sparsegrad_cli.records.run import ErrorBlock, RunRecord
from sparsegrad_cli.records.store import RUN, load_run, write
from sparsegrad_cli.study.engines import PATIENCE_S, Engine, Job

POLL_S = 0.3  # between two checks of a run
_STATED = ("done", "failed", "out_of_memory", "interrupted")  # statuses that a run writes itself
_INTERRUPTED = 130
_STATUS_OF_EXIT = {3: "out_of_memory", _INTERRUPTED: "interrupted"}


class Runs:
    """Train recipes in their folders through an engine, and stop all runs together.

    Args:
        engine: where the runs train.
        tell: called with a line for the user.

    Attributes:
        stopping: set as soon as no further run may start.
    """

    def __init__(self, engine: Engine, tell: Callable[[str], None] = lambda line: None) -> None:
        self.engine, self._tell = engine, tell
        self.stopping = threading.Event()
        self._lock = threading.Lock()
        self._active: dict[Path, Job] = {}

    def train(
        self,
        recipe: Recipe,
        folder: Path,
        *,
        started: Callable[[], None] = lambda: None,
        stop_when: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Train a recipe in a folder, or resume the same recipe's run from its checkpoint.

        The method returns when the run has ended and no process has locked its folder.

        Args:
            recipe: what to train.
            folder: the run's folder; the recipe is written next to it.
            started: called after the run has been submitted.
            stop_when: called repeatedly; True ends the run as Ctrl-C does.

        Returns:
            False if nothing was started, because all runs are being stopped.
        """
        self.wait_for_owner(folder)
        job = self._submit(recipe, folder)
        if job is None:
            return False
        try:
            started()
            while (code := job.wait(POLL_S)) is None:
                if stop_when():
                    code = self._end(job)
                    break
        finally:
            with self._lock:
                del self._active[folder]
        self.wait_for_owner(folder)
        _note_exit(folder, code, stopped=self.stopping.is_set())
        return True

    def is_active(self, folder: Path) -> bool:
        """Return whether the run of a folder is training, here or in another process."""
        return folder in self._active or owner_of(folder) is not None

    def stop(self) -> None:
        """Stop all runs. Each saves a checkpoint; a run that takes too long is killed."""
        self.stopping.set()
        with self._lock:
            active = list(self._active.values())
        for job in active:
            job.stop()
        for job in active:
            self._end(job)

    def run_all(self, work: list[Callable[[], None]]) -> None:
        """Call all functions, at most ``engine.jobs`` of them at once, and wait for them.

        Raises:
            BaseException: that of the first function that failed, or Ctrl-C. All runs have been
                stopped by then.
        """
        if not work:
            return
        pool = ThreadPoolExecutor(min(len(work), self.engine.jobs))
        try:
            for future in as_completed([pool.submit(self._unless_stopping, each) for each in work]):
                future.result()
        except BaseException:
            self.stop()
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def _unless_stopping(self, work: Callable[[], None]) -> None:
        if not self.stopping.is_set():
            work()

    def _submit(self, recipe: Recipe, folder: Path) -> Job | None:
        plain = {**to_plain(recipe), "output_dir": str(folder.absolute())}
        file = folder.with_name(folder.name + ".yaml")  # a label may contain a dot: 2.5e-4
        write_text_atomic(file, dump(plain))
        with self._lock:
            if self.stopping.is_set():
                return None
            job = self.engine.submit(file.absolute())
            self._active[folder] = job
        return job

    def _end(self, job: Job) -> int | None:
        """Stop a run, and kill it if it does not end in time or at a second Ctrl-C."""
        job.stop()
        try:
            code = job.wait(PATIENCE_S)
        except KeyboardInterrupt:
            code = None
        if code is None:
            job.kill()
            code = job.wait(PATIENCE_S)
        return code

    def wait_for_owner(self, folder: Path) -> None:
        """Wait while another process, or one that outlived its job, trains in the folder."""
        told = False
        while (owner := owner_of(folder)) is not None and not self.stopping.is_set():
            if not told:
                self._tell(f"{folder.name}: {owner} trains this run; waiting for it to end")
                told = True
            time.sleep(POLL_S)


def find_run(folder: Path) -> RunRecord | None:
    """Return the record of a run; None if there is no readable record."""
    try:
        return load_run(folder)
    except (FileFormatError, UsageError, OSError):
        return None


def is_of(run: RunRecord | None, recipe: Recipe) -> bool:
    """Return whether there is a record and it belongs to this recipe."""
    return run is not None and run.recipe_digest == digest(recipe)


def is_done(recipe: Recipe, folder: Path) -> bool:
    """Return whether the run of a recipe has finished in a folder."""
    run = find_run(folder)
    return run is not None and is_of(run, recipe) and run.status == "done"


def can_resume(recipe: Recipe, folder: Path) -> bool:
    """Return whether a run of the recipe left a checkpoint."""
    return is_of(find_run(folder), recipe) and any(folder.glob("checkpoint-*/state.json"))


@contextmanager
def managed(loaded: LoadedRecipe, tell: Callable[[str], None]) -> Iterator[bool]:
    """Lock the folder of a run for a study, and decide whether to resume.

    If another process trains in the folder, wait for it. The decision is made while the folder is
    locked, so a run is never done twice, even if several processes were started for it. When
    standard input ends, because the parent of this process stopped it or died, this process gets
    SIGINT.

    Yields:
        True to resume, also if the run has finished; False to start from the beginning.
    """
    threading.Thread(target=_interrupt_at_end_of_input, daemon=True).start()
    assert loaded.recipe.output_dir is not None
    folder = Path(loaded.recipe.output_dir)
    make_folder(folder)
    if (owner := owner_of(folder)) is not None:
        tell(f"{owner} trains this run; waiting for it to end")
    with FolderLock(folder, wait_s=None):
        recipe = loaded.recipe
        yield is_done(recipe, folder) or can_resume(recipe, folder)


def _interrupt_at_end_of_input() -> None:
    import os

    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGINT)


def _note_exit(folder: Path, code: int | None, *, stopped: bool) -> None:
    """Write the status of a run that died without writing it."""
    run = find_run(folder)
    if code == 0 or (run is not None and run.status in _STATED):
        return  # a finished run stays finished, even if its report failed
    if (run is None and (stopped or code == _INTERRUPTED)) or owner_of(folder) is not None:
        return
    status, what = _STATUS_OF_EXIT.get(code or 1, "failed"), f"ended with exit code {code}"
    if code == -signal.SIGKILL:
        status, what = "out_of_memory", "killed by the system, probably because memory ran out"
    if stopped:
        status, what = "interrupted", "stopped with the study"
    error = ErrorBlock(title="Run", what=what, where=str(folder), fix=None)
    make_folder(folder)
    write((run or RunRecord(status="failed")).changed(status=status, error=error), folder / RUN)
