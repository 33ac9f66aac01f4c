"""Kill -9 at named moments of real runs: a process that forks, spoils and waits.

Run as a program, it loads all libraries once and then takes jobs, a JSON line each, from stdin. A
job is one command line in a process of its own, forked off, with at most one function of it wrapped
so that the process kills itself there. Nothing of this is in the package.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent

# Of all other moments no report is written.
REPORTING = ("reporting", "reporting-interrupted", "reporting-full")

Patch = Callable[[int], None]
MOMENTS: dict[str, tuple[str, Patch]] = {}


def moment(name: str, words: str) -> Callable[[Patch], Patch]:
    """Enter a function that arms the n-th occurrence of a moment."""

    def enter(patch: Patch) -> Patch:
        MOMENTS[name] = (words, patch)
        return patch

    return enter


def die() -> None:
    """As the system's killer does it: no handler runs, nothing is flushed."""
    os.kill(os.getpid(), signal.SIGKILL)


def wrap(
    owner: Any,
    name: str,
    count: int,
    *,
    before: Callable[..., Any] | None = None,
    after: Callable[..., Any] | None = None,
    when: Callable[..., bool] = lambda *args, **kwargs: True,
) -> None:
    """Have something happen at the ``count``-th call of ``owner.name`` for which ``when`` holds."""
    real, calls = getattr(owner, name), [0]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        due = bool(when(*args, **kwargs))
        calls[0] += due
        due = due and calls[0] == count
        if due and before is not None:
            before(*args, **kwargs)
        found = real(*args, **kwargs)
        if due and after is not None:
            after(*args, **kwargs)
        return found

    setattr(owner, name, wrapped)


def _die(*args: Any, **kwargs: Any) -> None:
    die()


def _torn(tensors: Any, path: str | Path, metadata: Any = None) -> None:
    """Half of the file's bytes have reached the disk."""
    os.truncate(path, Path(path).stat().st_size // 2)
    die()


def _writes(beginning: str) -> Callable[..., bool]:
    return lambda tensors, path, metadata=None: Path(path).name.startswith(beginning)


def _renames(beginning: str) -> Callable[..., bool]:
    return lambda source, target: (
        Path(target).name.startswith(beginning) and source.name.endswith(".partial")
    )


@moment("begun", "the folder is made, the recipe is in it, no record yet")
def _begun(count: int) -> None:
    from sparsegrad_cli import runner

    wrap(runner, "RunRecord", count, before=_die)


@moment("loaded", "model and data are loaded")
def _loaded(count: int) -> None:
    from sparsegrad_cli.training.fine_tuning import TrainingSession

    wrap(TrainingSession, "load", count, after=_die)


@moment("calibrating", "in the middle of calibration")
def _calibrating(count: int) -> None:
    from sparsegrad_cli.training import calibration

    wrap(calibration, "gradient_step", count, after=_die)


@moment("basis-torn", "half of basis.safetensors is written")
def _basis_torn(count: int) -> None:
    from sparsegrad_cli.training import writing

    wrap(writing, "save_file", count, after=_torn, when=_writes("basis"))


@moment("calibrated", "calibration is done, its basis on the disk")
def _calibrated(count: int) -> None:
    from sparsegrad_cli.training import session

    wrap(session, "write_basis", count, after=_die)


@moment("record-torn", "half of run.json is written, under its temporary name")
def _record_torn(count: int) -> None:
    def half(source: Path, target: Path) -> None:
        os.truncate(source, source.stat().st_size // 2)
        die()

    wrap(
        Path,
        "replace",
        count,
        before=half,
        when=lambda source, target: Path(target).name == "run.json",
    )


@moment("step", "within a step, between two of its batches")
def _step(count: int) -> None:
    from sparsegrad_cli.training.trainer import SparsegradTrainer

    wrap(SparsegradTrainer, "training_step", count, after=_die)


@moment("interrupted", "Ctrl-C (SIGINT, not -9) in a step that is to be evaluated and saved")
def _interrupted(count: int) -> None:
    from sparsegrad_cli.training.trainer import SparsegradTrainer

    wrap(
        SparsegradTrainer,
        "training_step",
        count,
        after=lambda *args: os.kill(os.getpid(), signal.SIGINT),
    )


@moment("interrupted-twice", "Ctrl-C twice (SIGINT, not -9) within a step, which does not wait")
def _interrupted_twice(count: int) -> None:
    from sparsegrad_cli.training.trainer import SparsegradTrainer

    def press(*args: Any) -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    wrap(SparsegradTrainer, "training_step", count, after=press)


@moment("line-torn", "half a line of steps.jsonl is written")
def _line_torn(count: int) -> None:
    from sparsegrad_cli.training.callbacks import RecordCallback

    def tear(recorder: Any, record: Any) -> None:
        with recorder._path.open("a") as file:
            file.write(json.dumps(record)[:9])
        die()

    wrap(RecordCallback, "_append", count, before=tear)


@moment("evaluated", "an evaluation is done, its checkpoint not begun")
def _evaluated(count: int) -> None:
    from sparsegrad_cli.training.trainer import SparsegradTrainer

    wrap(SparsegradTrainer, "evaluate", count, after=_die)


@moment("checkpoint-begun", "the checkpoint's folder is made, still empty")
def _checkpoint_begun(count: int) -> None:
    from sparsegrad_cli.training import checkpoint

    wrap(checkpoint, "save_training_state", count, before=_die)


@moment("checkpoint-torn", "half of the checkpoint's first file is written")
def _checkpoint_torn(count: int) -> None:
    from sparsegrad_cli.training import writing

    wrap(writing, "save_file", count, after=_torn, when=_writes("trainable"))


@moment("checkpoint-written", "all of the checkpoint is written, under its temporary name")
def _checkpoint_written(count: int) -> None:
    wrap(Path, "replace", count, before=_die, when=_renames("checkpoint-"))


@moment("checkpoint-renamed", "the checkpoint is in its place, the one before not yet dropped")
def _checkpoint_renamed(count: int) -> None:
    wrap(Path, "replace", count, after=_die, when=_renames("checkpoint-"))


@moment("dropping", "a checkpoint over the limit is half removed")
def _dropping(count: int) -> None:
    import shutil

    def half(folder: Path, **options: Any) -> None:
        next(Path(folder).iterdir()).unlink()
        die()

    def full(folder: Path, **options: Any) -> bool:
        return Path(folder).name.endswith(".removed") and Path(folder).is_dir()

    wrap(shutil, "rmtree", count, before=half, when=full)


@moment("trained", "the last step is done, the final evaluation is not")
def _trained(count: int) -> None:
    from sparsegrad_cli.training.loop import TrainingLoop

    wrap(TrainingLoop, "_finish", count, before=_die)


@moment("adapter-torn", "half of adapter.safetensors is written")
def _adapter_torn(count: int) -> None:
    from sparsegrad_cli.training import writing

    wrap(writing, "save_file", count, after=_torn, when=_writes("adapter"))


@moment("adapter-renamed", "the adapter is in its place, the record does not say so")
def _adapter_renamed(count: int) -> None:
    wrap(Path, "replace", count, after=_die, when=_renames("adapter"))


@moment("reporting", "the record says done, the report is not written")
def _reporting(count: int) -> None:
    from sparsegrad_cli import runner

    wrap(runner, "_write_report", count, before=_die)


@moment("reporting-interrupted", "Ctrl-C (SIGINT, not -9) while the report is written")
def _reporting_interrupted(count: int) -> None:
    from sparsegrad_cli.report import html

    wrap(html, "write_run_html", count, before=lambda *args: os.kill(os.getpid(), signal.SIGINT))


@moment("export-begun", "an export's folder is made")
def _export_begun(count: int) -> None:
    from sparsegrad_cli.export import session

    wrap(session._Export, "fill", count, before=_die)


@moment("export-torn", "half of an export's model.safetensors is written")
def _export_torn(count: int) -> None:
    from transformers import modeling_utils

    wrap(modeling_utils, "safe_save_file", count, after=_torn)


@moment("export-written", "an export is written, under its temporary name")
def _export_written(count: int) -> None:
    wrap(Path, "replace", count, before=_die, when=_renames("export-"))


@moment("export-renamed", "an export is in its place, nothing has been said")
def _export_renamed(count: int) -> None:
    wrap(Path, "replace", count, after=_die, when=_renames("export-"))


# --- a world that is short of something; the count says how much is left


def _limit_memory(mebibytes: int) -> None:
    """So much address space more than the process has now, and not a page beyond."""
    import gc
    import resource

    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + mebibytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


@moment("short-of-memory", "MiB that are left once model and data are loaded")
def _short_of_memory(count: int) -> None:
    from sparsegrad_cli.training.fine_tuning import TrainingSession

    wrap(TrainingSession, "load", 1, after=lambda *args: _limit_memory(count))


@moment("short-of-memory-later", "MiB that are left when the second evaluation begins")
def _short_of_memory_later(count: int) -> None:
    from sparsegrad_cli.training.trainer import SparsegradTrainer

    wrap(SparsegradTrainer, "evaluate", 2, before=lambda *args, **kwargs: _limit_memory(count))


@moment("small-files", "KiB that a file may have: a full disk")
def _small_files(count: int) -> None:
    _limit_files(count)


@moment("reporting-full", "KiB that a file may have once the run is done: a full disk")
def _reporting_full(count: int) -> None:
    from sparsegrad_cli import runner

    wrap(runner, "_write_report", 1, before=lambda *args: _limit_files(count))


def _limit_files(kibibytes: int) -> None:
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kibibytes * 1024, kibibytes * 1024))


@moment("clock-back", "hours that the clock jumps back at every look")
def _clock_back(count: int) -> None:
    import datetime
    import time

    real, looks = time.time, [0]

    def backwards() -> float:
        looks[0] += 1
        return real() - 3600 * count * looks[0]

    class Backwards(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime.datetime:
            return datetime.datetime.fromtimestamp(backwards(), tz)

    time.time = backwards
    datetime.datetime = Backwards  # type: ignore[misc]


# --- the process that forks

_LIBRARIES = (
    "datasets",
    "evaluate",
    "matplotlib.pyplot",
    "peft",
    "sklearn.metrics",
    "scipy.stats",
    "transformers.trainer",
    "transformers.models.bert.modeling_bert",
    "transformers.models.auto.modeling_auto",
    "sparsegrad_cli.cli.app",
    "sparsegrad_cli.data.loading",
    "sparsegrad_cli.export.session",
    "sparsegrad_cli.report.html",
    "sparsegrad_cli.training.fine_tuning",
)


@dataclass(frozen=True)
class Ended:
    """How a command ended: -9 if it was killed."""

    code: int
    out: str
    err: str


class Killer:
    """The forking process; use as a context."""

    def __init__(self) -> None:
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": f"{REPO}{os.pathsep}{REPO / 'tests'}",
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
            # Threads and tables reserve address space that they never use.
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

    def __enter__(self) -> Killer:
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def run(self, *arguments: str, moment: str | None = None, count: int = 1) -> Ended:
        """One command line of sparsegrad, killed at the ``count``-th time of a moment."""
        return self._ask(arguments, 1, moment, count, 0)[0]

    def together(
        self, *arguments: str, moment: str | None = None, count: int = 1, of: int = 0
    ) -> list[Ended]:
        """The same in two processes that train together; the moment is that of number ``of``.

        When one is killed, so is the other, as whoever started them would see to. One that goes
        on for a minute after the other has ended is killed, too.
        """
        return self._ask(arguments, 2, moment, count, of)

    def _ask(self, arguments: tuple[str, ...], processes: int, *moment: Any) -> list[Ended]:
        assert self._process.stdin is not None and self._process.stdout is not None
        job = {"arguments": arguments, "processes": processes, "moment": moment}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the forking process has died"
        return [Ended(**ended) for ended in json.loads(answer)]


def _child(job: dict[str, Any], number: int, port: int, said: tuple[Path, Path]) -> None:
    for stream, path in enumerate(said, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    if job["processes"] > 1:
        place = {"RANK": number, "LOCAL_RANK": number, "MASTER_ADDR": "127.0.0.1"}
        size = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in (place | size).items()})
    moment, count, of = job["moment"]
    if moment is not None and number == of:
        MOMENTS[moment][1](count)
    if moment not in REPORTING:  # takes longer than all the rest
        from sparsegrad_cli import runner

        runner._write_report = lambda record, observer: None
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
    """How they ended. See :meth:`Killer.together`."""
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
