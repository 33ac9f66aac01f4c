"""Named points of a run, and what happens there: usually the process kills itself.

A point is a patch, made in a forked process of its own (tests/support/kill_process.py). The package
holds nothing of this.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
        Path(target).name.startswith(beginning)
        and ".partial" in (source.suffix, source.parent.suffix)
    )


@moment("begun", "the folder is made, the recipe is in it, no record yet")
def _begun(count: int) -> None:
    from sparsegrad_cli.run import open_run

    wrap(open_run, "RunWriter", count, before=_die)


@moment("loaded", "model and data are loaded")
def _loaded(count: int) -> None:
    from sparsegrad_cli.training import fine_tuning

    wrap(fine_tuning, "load", count, after=_die)


@moment("calibrating", "in the middle of calibration")
def _calibrating(count: int) -> None:
    from sparsegrad_cli.calibration import calibrate as calibration

    wrap(calibration, "gradient_step", count, after=_die)


@moment("basis-torn", "half of basis.safetensors is written")
def _basis_torn(count: int) -> None:
    import safetensors.torch

    wrap(safetensors.torch, "save_file", count, after=_torn, when=_writes("basis"))


@moment("calibrated", "calibration is done, its basis on the disk")
def _calibrated(count: int) -> None:
    from sparsegrad_cli.calibration import run_calibration

    wrap(run_calibration, "write_basis", count, after=_die)


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
    from sparsegrad_cli.training.optimizer_steps import OptimizerSteps

    wrap(OptimizerSteps, "_backward", count, after=_die)


@moment("interrupted", "Ctrl-C (SIGINT, not -9) in a step that is to be evaluated and saved")
def _interrupted(count: int) -> None:
    from sparsegrad_cli.training.optimizer_steps import OptimizerSteps

    wrap(
        OptimizerSteps,
        "_backward",
        count,
        after=lambda *args: os.kill(os.getpid(), signal.SIGINT),
    )


@moment("interrupted-twice", "Ctrl-C twice (SIGINT, not -9) within a step, which does not wait")
def _interrupted_twice(count: int) -> None:
    from sparsegrad_cli.training.optimizer_steps import OptimizerSteps

    def press(*args: Any) -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    wrap(OptimizerSteps, "_backward", count, after=press)


def _asked_to_stop(owner: Any, name: str, count: int, *, times: int = 1) -> None:
    """SIGTERM at the ``count``-th call of ``owner.name``; every call leaves a line on stderr."""
    real, calls = getattr(owner, name), [0]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        os.write(2, f"called {name}\n".encode())
        if calls[0] == count:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    setattr(owner, name, wrapped)


@moment("interrupted-calibrating", "SIGTERM in the middle of calibration")
def _interrupted_calibrating(count: int) -> None:
    from sparsegrad_cli.calibration import calibrate as calibration

    _asked_to_stop(calibration, "gradient_step", count)


@moment("interrupted-calibrating-twice", "SIGTERM twice in the middle of calibration")
def _interrupted_calibrating_twice(count: int) -> None:
    from sparsegrad_cli.calibration import calibrate as calibration

    _asked_to_stop(calibration, "gradient_step", count, times=2)


@moment("interrupted-warming", "SIGTERM while the head warms up")
def _interrupted_warming(count: int) -> None:
    from sparsegrad_cli.calibration import warmup

    _asked_to_stop(warmup, "gradient_step", count)


@moment("interrupted-decomposing", "SIGTERM while bases are computed")
def _interrupted_decomposing(count: int) -> None:
    from sparsegrad_cli.numerics.sketch import SketchStream

    _asked_to_stop(SketchStream, "basis", count)


@moment("interrupted-measuring", "SIGTERM while the energy of held-out gradients is measured")
def _interrupted_measuring(count: int) -> None:
    from sparsegrad_cli.calibration import diagnostics

    _asked_to_stop(diagnostics, "gradient_step", count)


@moment("interrupted-evaluating", "SIGTERM in the middle of an evaluation")
def _interrupted_evaluating(count: int) -> None:
    from sparsegrad_cli.training import loaders

    _asked_to_stop(loaders, "ValidationBatch", count)


@moment("interrupted-loading", "SIGTERM while model and data are loaded")
def _interrupted_loading(count: int) -> None:
    from sparsegrad_cli.tasks import setup

    _asked_to_stop(setup, "make_setup", count)


@moment("interrupted-probing", "SIGTERM while memory is measured in a step")
def _interrupted_probing(count: int) -> None:
    from sparsegrad_cli.training import memory_probe

    _asked_to_stop(memory_probe, "longest_batch", count)


@moment("line-torn", "half a line of steps.jsonl is written")
def _line_torn(count: int) -> None:
    from sparsegrad_cli.training.step_log import StepLog

    def tear(log: Any, line: Any) -> None:
        with log._path.open("a") as file:
            file.write(json.dumps(line)[:9])
        die()

    wrap(StepLog, "_append", count, before=tear)


@moment("evaluated", "an evaluation is done, its checkpoint not begun")
def _evaluated(count: int) -> None:
    from sparsegrad_cli.training.evaluation import Evaluator

    wrap(Evaluator, "evaluate", count, after=_die)


@moment("checkpoint-begun", "the checkpoint's folder is made, still empty")
def _checkpoint_begun(count: int) -> None:
    from sparsegrad_cli.training import checkpoint

    wrap(checkpoint, "write_checkpoint", count, before=_die)


@moment("checkpoint-torn", "half of the checkpoint's first file is written")
def _checkpoint_torn(count: int) -> None:
    import safetensors.torch

    wrap(safetensors.torch, "save_file", count, after=_torn, when=_writes("trainable"))


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
    from sparsegrad_cli.training import loop

    wrap(loop, "record_outcome", count, before=_die)


@moment("adapter-torn", "half of adapter.safetensors is written")
def _adapter_torn(count: int) -> None:
    import safetensors.torch

    wrap(safetensors.torch, "save_file", count, after=_torn, when=_writes("adapter"))


@moment("adapter-renamed", "the adapter is in its place, the record does not say so")
def _adapter_renamed(count: int) -> None:
    wrap(Path, "replace", count, after=_die, when=_renames("adapter"))


@moment("reporting", "the record says done, the report is not written")
def _reporting(count: int) -> None:
    from sparsegrad_cli.run import open_run

    wrap(open_run, "write_report", count, before=_die)


@moment("reporting-begins", "Ctrl-C (SIGINT, not -9) at the very moment that the record says done")
def _reporting_begins(count: int) -> None:
    from sparsegrad_cli.records.writer import RunWriter

    wrap(RunWriter, "finish", count, after=lambda *args: os.kill(os.getpid(), signal.SIGINT))


@moment("reporting-interrupted", "Ctrl-C (SIGINT, not -9) while the report is written")
def _reporting_interrupted(count: int) -> None:
    from sparsegrad_cli.report import files

    wrap(files, "write_run_report", count, before=lambda *args: os.kill(os.getpid(), signal.SIGINT))


@moment("export-begun", "an export's folder is made")
def _export_begun(count: int) -> None:
    from sparsegrad_cli.export import export_run as session

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
    from sparsegrad_cli.training import fine_tuning

    wrap(fine_tuning, "load", 1, after=lambda *args: _limit_memory(count))


@moment("short-of-memory-later", "MiB that are left when the second evaluation begins")
def _short_of_memory_later(count: int) -> None:
    from sparsegrad_cli.training.evaluation import Evaluator

    wrap(Evaluator, "evaluate", 2, before=lambda *args, **kwargs: _limit_memory(count))


@moment("small-files", "KiB that a file may have: a full disk")
def _small_files(count: int) -> None:
    _limit_files(count)


@moment("reporting-full", "KiB that a file may have once the run is done: a full disk")
def _reporting_full(count: int) -> None:
    from sparsegrad_cli.run import open_run

    wrap(open_run, "write_report", 1, before=lambda *args: _limit_files(count))


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
        def now(cls, tz: Any = None) -> Backwards:
            return cls.fromtimestamp(backwards(), tz)

    time.time = backwards
    datetime.datetime = Backwards  # type: ignore[misc]
