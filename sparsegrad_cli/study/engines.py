"""Where the runs of a study train: in processes on this machine, as Slurm jobs, or on Ray.

Every run trains in its own process. Memory that one method leaks therefore does not affect the next
one, and if the system kills a run for memory, the other runs continue. The process reads its
standard input to the end of file, which comes when its parent stops it or dies. The run then saves
a checkpoint and ends, so that a killed coordinator, Slurm job or Ray worker leaves no orphan.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import IO, Protocol

PATIENCE_S = 120.0  # time that a run gets to save a checkpoint after it was told to stop


class Job(Protocol):
    """A run that an engine trains."""

    def wait(self, timeout_s: float | None) -> int | None:
        """Return the exit code of ``sparsegrad train``; None if it still runs at the timeout."""

    def stop(self) -> None:
        """Tell the run to save a checkpoint and exit."""

    def kill(self) -> None:
        """End the run at once."""


class Engine(Protocol):
    """A place where runs train.

    Attributes:
        jobs: number of runs to submit at once.
        quiet: whether runs hide their progress.
    """

    jobs: int
    quiet: bool

    def submit(self, recipe: Path) -> Job:
        """Start to train a recipe file, whose ``output_dir`` is absolute."""

    def close(self) -> None:
        """Release the engine's resources. No run is active any more."""


class TrainProcess:
    """A ``sparsegrad train --managed`` process.

    Args:
        recipe: the recipe file.
        quiet: whether to hide progress.
        environment: variables to set in addition to those of this process.
    """

    def __init__(
        self, recipe: Path, *, quiet: bool, environment: dict[str, str] | None = None
    ) -> None:
        command = [sys.executable, "-m", "sparsegrad_cli", "train", str(recipe), "--managed"]
        self._process = subprocess.Popen(
            [*command, "--quiet"] if quiet else command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL if quiet else None,
            env=os.environ | (environment or {}),
            start_new_session=True,  # Ctrl-C in the terminal reaches only the coordinator
        )

    def wait(self, timeout_s: float | None) -> int | None:
        """Return the exit code; None if the process is still running at the timeout."""
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None
        self.stop()  # closes the pipe
        return code

    def stop(self) -> None:
        """Tell the run to save a checkpoint and exit."""
        stdin: IO[bytes] | None = self._process.stdin
        if stdin is not None:
            with suppress(OSError):
                stdin.close()

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()


def train_in_process(recipe: str, environment: dict[str, str]) -> int:
    """Train a recipe file in its own process, and return its exit code.

    Slurm jobs and Ray tasks call this function. If it is stopped in any way, the run saves a
    checkpoint and ends.
    """
    process = TrainProcess(Path(recipe), quiet=True, environment=environment)
    try:
        code = process.wait(None)
    except BaseException:
        process.stop()
        process.wait(PATIENCE_S)
        raise
    return 1 if code is None else code


class LocalEngine:
    """Train runs in processes on this machine that share its cores and use one GPU each.

    Args:
        jobs: number of processes at once.
        quiet: whether runs hide their progress; several at once always do.
    """

    def __init__(self, jobs: int, *, quiet: bool = False) -> None:
        self.jobs, self.quiet = jobs, quiet or jobs > 1
        self._lock = threading.Lock()
        self._users: dict[str, int] | None = None  # GPU -> runs that train on it

    def submit(self, recipe: Path) -> Job:
        """Start a process on the GPU that the fewest runs use."""
        environment = shared_cores(self.jobs)
        with self._lock:
            if self._users is None:
                self._users = dict.fromkeys(visible_gpus(), 0)
            users = self._users
            gpu = min(users, key=lambda name: users[name]) if len(users) > 1 else None
            if gpu is not None:
                environment["CUDA_VISIBLE_DEVICES"] = gpu
                users[gpu] += 1
            try:
                process = TrainProcess(recipe, quiet=self.quiet, environment=environment)
            except BaseException:
                self._release(gpu)
                raise
        return _LocalJob(process, self, gpu)

    def close(self) -> None:
        """Do nothing: the engine holds no resources."""

    def _release(self, gpu: str | None) -> None:
        if gpu is not None and self._users is not None:
            self._users[gpu] -= 1


class _LocalJob:
    """A process and the GPU that it uses until it ends."""

    def __init__(self, process: TrainProcess, engine: LocalEngine, gpu: str | None) -> None:
        self._process, self._engine, self._gpu = process, engine, gpu
        self.stop, self.kill = process.stop, process.kill

    def wait(self, timeout_s: float | None) -> int | None:
        code = self._process.wait(timeout_s)
        if code is not None:
            with self._engine._lock:
                self._engine._release(self._gpu)
                self._gpu = None
        return code


def shared_cores(jobs: int) -> dict[str, str]:
    """Return the environment variables for each of ``jobs`` processes that run at once."""
    if jobs == 1:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, named as in CUDA_VISIBLE_DEVICES."""
    said = os.environ.get("CUDA_VISIBLE_DEVICES")
    if said is not None:
        return [name.strip() for name in said.split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]
