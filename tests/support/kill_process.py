"""A fork server for command lines that are killed at a named point.

Run as a program, it imports all libraries once and then reads jobs from stdin, one JSON line each.
Each job is one command line in a forked process, in which at most one kill point
(tests/support/kill_points.py) is active.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.kill_points import KILL_POINTS, REPORTING

REPO = Path(__file__).resolve().parents[2]

_LIBRARIES = (
    "datasets",
    "evaluate",
    "matplotlib.pyplot",
    "peft",
    "sklearn.metrics",
    "scipy.stats",
    "accelerate",
    "transformers.models.bert.modeling_bert",
    "transformers.models.auto.modeling_auto",
    "sparsegrad_cli.cli.app",
    "sparsegrad_cli.data.load_task",
    "sparsegrad_cli.export.export_run",
    "sparsegrad_cli.report.render",
    "sparsegrad_cli.training.fine_tuning",
)


@dataclass(frozen=True)
class ProcessResult:
    """Exit code (-9 if it was killed) and output of a command."""

    code: int
    out: str
    err: str


class ForkServer:
    """The fork server as a context manager."""

    def __init__(self) -> None:
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": f"{REPO}{os.pathsep}{REPO / 'tests'}",
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
            # Otherwise threads and tables reserve address space that they never use.
            "MALLOC_ARENA_MAX": "1",
            "ARROW_DEFAULT_MEMORY_POOL": "system",
        }
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def run(self, *arguments: str, point: str | None = None, count: int = 1) -> ProcessResult:
        """Run one command line, with ``point`` active at its ``count``-th occurrence."""
        return self._ask(arguments, 1, point, count, 0)[0]

    def run_two(
        self, *arguments: str, point: str | None = None, count: int = 1, of: int = 0
    ) -> list[ProcessResult]:
        """Run it in two distributed processes, with the point active in process number ``of``.

        If one is killed, the other is killed too, as a launcher does. One that still runs a minute
        after the other has ended is also killed.
        """
        return self._ask(arguments, 2, point, count, of)

    def _ask(self, arguments: tuple[str, ...], processes: int, *point: Any) -> list[ProcessResult]:
        assert self._process.stdin is not None and self._process.stdout is not None
        job = {"arguments": arguments, "processes": processes, "point": point}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the fork server has died"
        return [ProcessResult(**ended) for ended in json.loads(answer)]


def _child(job: dict[str, Any], number: int, port: int, said: tuple[Path, Path]) -> None:
    for stream, path in enumerate(said, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    if job["processes"] > 1:
        place = {"RANK": number, "LOCAL_RANK": number, "MASTER_ADDR": "127.0.0.1"}
        size = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in (place | size).items()})
    point, count, of = job["point"]
    if point is not None and number == of:
        KILL_POINTS[point][1](count)
    if point not in REPORTING:  # writing a report takes longer than the rest
        from sparsegrad_cli.run import open_run

        open_run.write_report = lambda *args: None
    from sparsegrad_cli.cli.app import main

    sys.argv = ["sparsegrad", *job["arguments"]]
    main()


def _fork(job: dict[str, Any], number: int, port: int, said: tuple[Path, Path]) -> int:
    process = os.fork()
    if process:
        return process
    try:
        _child(job, number, port, said)
    except SystemExit as ended:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ended.code if isinstance(ended.code, int) else 1)
    finally:
        os._exit(99)


def _waited(processes: list[int]) -> list[int]:
    """Wait, and return exit codes. See :meth:`ForkServer.run_two`."""
    codes: dict[int, int] = {}
    deadline = None
    while len(codes) < len(processes):
        for process in processes:
            found, status = os.waitpid(process, os.WNOHANG) if process not in codes else (0, 0)
            if found:
                codes[process] = os.waitstatus_to_exitcode(status)
                deadline = time.monotonic() + (0 if codes[process] < 0 else 60)
        for process in processes if deadline and time.monotonic() > deadline else ():
            if process not in codes:
                os.kill(process, signal.SIGKILL)
        time.sleep(0.005)
    return [codes[process] for process in processes]


def _serve() -> None:
    import gc
    import socket
    import tempfile

    import torch

    for name in _LIBRARIES:
        importlib.import_module(name)
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    with tempfile.TemporaryDirectory() as place:
        said = [(Path(place) / f"out{number}", Path(place) / f"err{number}") for number in (0, 1)]
        for line in sys.stdin:
            job = json.loads(line)
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            processes = [_fork(job, n, port, said[n]) for n in range(job["processes"])]
            answer = [
                {"code": code, "out": out.read_text(), "err": err.read_text(errors="replace")}
                for code, (out, err) in zip(_waited(processes), said, strict=False)
            ]
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
