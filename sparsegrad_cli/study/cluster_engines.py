"""Engines that train runs elsewhere: Slurm through submitit, and Ray. Both are optional extras.

The machines must share the study's folder with the coordinator and have sparsegrad installed.
"""

from __future__ import annotations

import importlib
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

from sparsegrad_cli.error_mapping import first_line
from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.recipe.study_section import RaySettings, SlurmSettings
from sparsegrad_cli.study.engines import Job, train_in_process

MOST_AT_ONCE = 32  # default number of runs that are submitted to a cluster at once
_POLL_S = 0.5
_FAILED, _OUT_OF_MEMORY, _INTERRUPTED = 1, 3, 130  # exit codes of `sparsegrad train`


class SlurmEngine:
    """Submit every run as its own Slurm job.

    Args:
        settings: ``engine.slurm`` of the study.
        folder: parent folder of submitit's job files and logs. Every coordinator makes a new
            subfolder, so that files of an earlier one are never read.
        jobs: number of jobs in the queue at once.

    Raises:
        UsageError: submitit or ``sbatch`` is missing.
    """

    quiet = True

    def __init__(self, settings: SlurmSettings, folder: Path, jobs: int | None) -> None:
        submitit = _package("submitit", "slurm")
        if settings.cluster == "slurm" and shutil.which("sbatch") is None:
            raise UsageError(
                "the engine slurm needs sbatch, which is not on the PATH",
                where="engine: slurm",
                fix="run compare on a login node of the cluster, or use --engine local",
            )
        self.jobs = jobs or MOST_AT_ONCE
        number = 1
        while True:
            try:
                logs = folder / str(number)
                logs.mkdir(parents=True)
                break
            except FileExistsError:
                number += 1
        self._executor = submitit.AutoExecutor(folder=logs, cluster=settings.cluster)
        self._executor.update_parameters(**settings.parameters())
        cpus = settings.cpus_per_task
        self._environment = {} if cpus is None else {"OMP_NUM_THREADS": str(cpus)}
        self._lock = threading.Lock()

    def submit(self, recipe: Path) -> Job:
        """Submit a job."""
        with self._lock:
            return _SlurmJob(
                self._executor.submit(_Requeued(), str(recipe), self._environment), self._lock
            )

    def close(self) -> None:
        """Do nothing: all jobs have ended."""


class _Requeued:
    """A submitit function that is queued again if its job is preempted or runs out of time."""

    def __call__(self, recipe: str, environment: dict[str, str]) -> int:
        return train_in_process(recipe, environment)

    def checkpoint(self, recipe: str, environment: dict[str, str]) -> Any:
        """Return the submission that resumes from the run's checkpoint."""
        return _package("submitit", "slurm").helpers.DelayedSubmission(self, recipe, environment)


class _SlurmJob:
    def __init__(self, job: Any, lock: threading.Lock) -> None:
        self._job, self._lock = job, lock

    def wait(self, timeout_s: float | None) -> int | None:
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            with self._lock:
                if self._job.done():
                    return self._code()
            left = _POLL_S if end is None else end - time.monotonic()
            if left <= 0:
                return None
            time.sleep(min(_POLL_S, left))

    def _code(self) -> int:
        try:
            return int(self._job.result())
        except Exception:  # the job ended without a result: killed, out of memory, node lost
            return _OUT_OF_MEMORY if "OUT_OF_ME" in str(self._job.state) else _FAILED

    def stop(self) -> None:
        with self._lock:
            self._job.cancel(check=False)

    kill = stop


class RayEngine:
    """Submit every run as a Ray task.

    Args:
        settings: ``engine.ray`` of the study.
        jobs: number of tasks submitted at once; Ray starts those that it has resources for.

    Raises:
        UsageError: Ray is missing, or its cluster cannot be reached.
    """

    quiet = True

    def __init__(self, settings: RaySettings, jobs: int | None) -> None:
        self._ray = _package("ray", "ray")
        self.jobs = jobs or MOST_AT_ONCE
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        self._started = not self._ray.is_initialized()
        if self._started:
            try:
                self._ray.init(address=settings.address, log_to_driver=False, logging_level="error")
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise UsageError(
                    f"the Ray cluster cannot be reached: {first_line(error)}",
                    where="engine.ray.address",
                    fix="start it with `ray start --head`, or leave the address out to use a "
                    "cluster of this machine alone",
                ) from error
        gpus = settings.num_gpus
        if gpus is None:
            gpus = 1 if self._ray.cluster_resources().get("GPU", 0) else 0
        resources = {"num_cpus": settings.num_cpus, "num_gpus": gpus, "max_retries": 0}
        self._task = self._ray.remote(**resources)(train_in_process)
        self._environment = {"OMP_NUM_THREADS": str(max(1, int(settings.num_cpus)))}

    def submit(self, recipe: Path) -> Job:
        """Submit a task."""
        return _RayJob(self._ray, self._task.remote(str(recipe), self._environment))

    def close(self) -> None:
        """Disconnect from the cluster, and shut it down if this engine started it."""
        if self._started:
            self._ray.shutdown()


class _RayJob:
    def __init__(self, ray: Any, task: Any) -> None:
        self._ray, self._task = ray, task

    def wait(self, timeout_s: float | None) -> int | None:
        ended, _ = self._ray.wait([self._task], timeout=timeout_s)
        if not ended:
            return None
        try:
            return int(self._ray.get(self._task))
        except self._ray.exceptions.OutOfMemoryError:
            return _OUT_OF_MEMORY
        except (self._ray.exceptions.TaskCancelledError, KeyboardInterrupt):
            return _INTERRUPTED
        except self._ray.exceptions.RayError:
            return _FAILED

    def stop(self) -> None:
        self._ray.cancel(self._task)

    def kill(self) -> None:
        self._ray.cancel(self._task, force=True)


def _package(name: str, extra: str) -> Any:
    """Import an optional package.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(
            f"the engine {extra} needs the package {name}, which is not installed",
            where=f"engine: {extra}",
            fix=f"pip install 'sparsegrad[{extra}]', or --engine local",
        ) from error
