"""Work that several threads and processes share: each job is done once, by whoever claims it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from sparsegrad_cli.study.claims import Claim, claim, holder_of
from sparsegrad_cli.study.worker_pool import Crew

POLL_S = 0.3  # between looks at what other processes have


@dataclass(frozen=True)
class Job:
    """Something to do once.

    Attributes:
        name: for the line told before it.
        claim: the file that stands for it.
        settled: whether it needs doing no more; asked by whoever has just claimed it.
        run: do it; the claim is given back afterwards.
    """

    name: str
    claim: Path
    settled: Callable[[], bool]
    run: Callable[[Claim], None]


def work_off(jobs: Sequence[Job], at_once: int, tell: Callable[[str], None], crew: Crew) -> None:
    """Do all jobs that are free, in their order; then wait for those that other processes have.

    A job whose process dies is free again, and done here.

    Args:
        jobs: what to do.
        at_once: threads.
        tell: called with a line before each job.
        crew: whose processes the jobs start; once it is stopping, no job is begun any more.

    Raises:
        BaseException: of a job, or Ctrl-C; the crew has stopped, and all jobs have ended.
    """
    shop = _Shop(list(jobs), tell, crew.stopping)
    pool = ThreadPoolExecutor(at_once)
    try:
        for future in as_completed([pool.submit(shop.work) for _ in range(at_once)]):
            future.result()
    except BaseException:
        crew.stop()
        raise
    finally:
        pool.shutdown()


class _Shop:
    """The jobs that nobody here has begun, and the threads' way of taking one."""

    def __init__(
        self, jobs: list[Job], tell: Callable[[str], None], stopping: threading.Event
    ) -> None:
        self._jobs, self._tell, self._stopping = jobs, tell, stopping
        self._lock = threading.Lock()
        self._passed_over: set[str] = set()

    def work(self) -> None:
        """Until nothing is left, or ``stopping`` is set."""
        while not self._stopping.is_set():
            with self._lock:
                found = self._next()
                if found is None and not self._jobs:
                    return
            if found is None:
                self._stopping.wait(POLL_S)
                continue
            job, held = found
            with held:
                if job.settled():
                    by = " by another process" if job.name in self._passed_over else " before"
                    self._tell(f"{job.name}: done{by}")
                else:
                    self._tell(job.name)
                    job.run(held)

    def _next(self) -> tuple[Job, Claim] | None:
        for job in self._jobs:
            held = claim(job.claim)
            if held is not None:
                self._jobs.remove(job)
                return job, held
            if job.name not in self._passed_over:
                who = holder_of(job.claim)
                if who:
                    self._passed_over.add(job.name)
                    self._tell(f"{job.name}: {who} runs it")
        return None
