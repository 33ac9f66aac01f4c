"""The processes of a comparison: each run in one of its own, all stopped together.

Memory that one method leaves behind cannot burden the next, and a run that is killed for memory
takes nothing else with it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsegrad_cli.errors import FileFormatError, UsageError
from sparsegrad_cli.io.locks import owner_of
from sparsegrad_cli.recipe.load_recipe import digest, to_plain
from sparsegrad_cli.recipe.schema import Recipe
from sparsegrad_cli.recipe.yaml_text import dump
from sparsegrad_cli.records.store import SCHEMA, load_record, write_json_atomic, write_text_atomic
from sparsegrad_cli.report.labels import status_of
from sparsegrad_cli.study.claims import FileLock

PATIENCE_S = 120  # for a run that was asked to stop, to save
_SAID = ("done", "failed", "out_of_memory", "interrupted")  # by the run itself
_EXIT_STATUS = {1: "failed", 2: "failed", 3: "out_of_memory", 130: "interrupted"}


class Crew:
    """Starts runs and ends them.

    Args:
        quiet: runs show no progress.
        jobs: how many are to run at once; the cores are shared out among them.

    Attributes:
        stopping: set once no run is started any more.
    """

    def __init__(self, *, quiet: bool, jobs: int) -> None:
        self._quiet, self._jobs = quiet or jobs > 1, jobs
        self.stopping = threading.Event()
        self._lock = threading.Lock()
        self._running: list[subprocess.Popen[bytes]] = []

    def start(
        self, recipe: Recipe, folder: Path, held: Sequence[FileLock]
    ) -> subprocess.Popen[bytes] | None:
        """Begin a run, or go on with the same one from its checkpoint; None while stopping.

        Args:
            recipe: the run's; written beside its folder.
            folder: the run's.
            held: locks that the process holds as long as it lives, whatever becomes of this one.
        """
        plain = {**to_plain(recipe), "output_dir": str(folder.absolute())}
        file = folder.with_name(folder.name + ".yaml")  # a label may hold a dot: 2.5e-4
        write_text_atomic(file, dump(plain))
        mode = "--resume" if can_resume(recipe, folder) else "--overwrite"
        command = [sys.executable, "-m", "sparsegrad_cli", "train", str(file), mode]
        with self._lock:
            if self.stopping.is_set():
                return None
            process = subprocess.Popen(
                [*command, "--quiet"] if self._quiet else command,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL if self._quiet else None,
                env=os.environ | shared_cores(self._jobs),
                # The terminal's Ctrl-C reaches us alone; we pass it on, once.
                start_new_session=True,
                pass_fds=[lock.fileno() for lock in held],
            )
            self._running.append(process)
        return process

    def wait(self, process: subprocess.Popen[bytes], folder: Path) -> None:
        """Until it has ended; one that died without writing its status gets one here."""
        code = process.wait()
        with self._lock:
            self._running.remove(process)
        _note_exit(folder, code, stopped=self.stopping.is_set())

    def stop(self) -> None:
        """Pass Ctrl-C on to all, give them time to save, then insist."""
        self.stopping.set()
        with self._lock:
            running = list(self._running)
        for process in running:
            process.send_signal(signal.SIGINT)
        for process in running:
            stop_process(process, asked=True)


def shared_cores(jobs: int) -> dict[str, str]:
    """What to set in the environment of each of so many processes at once."""
    if jobs == 1:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}


def stop_process(process: subprocess.Popen[bytes], *, asked: bool = False) -> None:
    """End a run as Ctrl-C does; one that does not listen, at once.

    Args:
        process: the run's.
        asked: it has been told already.
    """
    try:
        if not asked:
            process.send_signal(signal.SIGINT)
        process.wait(timeout=PATIENCE_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.kill()
        process.wait()


def run_in(folder: Path) -> dict[str, Any] | None:
    """The record of a run; None where there is none that can be read."""
    try:
        return load_record(folder)
    except (FileFormatError, UsageError, OSError):
        return None


def is_of(run: Mapping[str, Any] | None, recipe: Recipe) -> bool:
    """Whether a record is there, and of this recipe."""
    return run is not None and run.get("recipe_digest") == digest(recipe)


def can_resume(recipe: Recipe, folder: Path) -> bool:
    """Whether a run of the recipe left a checkpoint."""
    return is_of(run_in(folder), recipe) and any(folder.glob("checkpoint-*/state.json"))


def _note_exit(folder: Path, code: int, *, stopped: bool) -> None:
    run = run_in(folder)
    if code == 130 or (stopped and run is None):  # it has said so itself, or had not begun
        return
    if owner_of(folder):  # another has the folder, by `sparsegrad train`
        return
    run = run or {"schema": SCHEMA, "status": "running", "recipe_digest": None}
    if code == 0 or status_of(run) in _SAID:  # done stays done, though its report failed
        return
    killed = code == -signal.SIGKILL
    what = "killed by the system, most likely for memory" if killed else f"ended with {code}"
    run["status"] = "out_of_memory" if killed else _EXIT_STATUS.get(code, "failed")
    if stopped:
        run["status"], what = "interrupted", "stopped with the comparison"
    run["error"] = {"title": "Cell", "what": what, "where": str(folder), "fix": None}
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(folder / "run.json", run)
