"""Named points at which a run kills itself, receives a signal or runs out of a resource.

Each point patches a function of the package in a forked process (tests/support/kill_process.py).
The package itself has no test hooks.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Runs write a report only at these points.
REPORTING = ("reporting", "reporting-interrupted", "reporting-full")

Patch = Callable[[int], None]
KILL_POINTS: dict[str, tuple[str, Patch]] = {}


def kill_point(name: str, words: str) -> Callable[[Patch], Patch]:
    """Register a function that acts at the n-th occurrence of a point; ``words`` describe it."""

    def enter(patch: Patch) -> Patch:
        KILL_POINTS[name] = (words, patch)
        return patch

    return enter


def kill_self() -> None:
    """Kill the process with SIGKILL: no handler runs and nothing is flushed."""
    os.kill(os.getpid(), signal.SIGKILL)


def patch_call(
    owner: Any,
    name: str,
    count: int,
    *,
    before: Callable[..., Any] | None = None,
    after: Callable[..., Any] | None = None,
    when: Callable[..., bool] = lambda *args, **kwargs: True,
) -> None:
    """Act at the ``count``-th call of ``owner.name`` for which ``when`` returns True."""
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
    kill_self()


def _torn(tensors: Any, path: str | Path, metadata: Any = None) -> None:
    """Keep half of the file, then die."""
    os.truncate(path, Path(path).stat().st_size // 2)
    kill_self()


def _writes(beginning: str) -> Callable[..., bool]:
    return lambda tensors, path, metadata=None: Path(path).name.startswith(beginning)


def _renames(beginning: str) -> Callable[..., bool]:
    return lambda source, target: (
        Path(target).name.startswith(beginning)
        and ".partial" in (source.suffix, source.parent.suffix)
    )


@kill_point("begun", "the folder and recipe.yaml exist, run.json does not")
def _begun(count: int) -> None:
    from sparsegrad_cli.run import open_run

    patch_call(open_run, "RunWriter", count, before=_die)


@kill_point("loaded", "model and data have been loaded")
def _loaded(count: int) -> None:
    from sparsegrad_cli.training import fine_tuning

    patch_call(fine_tuning, "load", count, after=_die)


@kill_point("calibrating", "during calibration")
def _calibrating(count: int) -> None:
    from sparsegrad_cli.calibration import calibrate as calibration

    patch_call(calibration, "gradient_step", count, after=_die)


@kill_point("basis-torn", "half of basis.safetensors is written")
def _basis_torn(count: int) -> None:
    import safetensors.torch

    patch_call(safetensors.torch, "save_file", count, after=_torn, when=_writes("basis"))


@kill_point("calibrated", "the basis has been written")
def _calibrated(count: int) -> None:
    from sparsegrad_cli.calibration import run_calibration

    patch_call(run_calibration, "write_basis", count, after=_die)


@kill_point("record-torn", "half of run.json is written, under its temporary name")
def _record_torn(count: int) -> None:
    def half(source: Path, target: Path) -> None:
        os.truncate(source, source.stat().st_size // 2)
        kill_self()

    patch_call(
        Path,
        "replace",
        count,
        before=half,
        when=lambda source, target: Path(target).name == "run.json",
    )


@kill_point("step", "between two batches of a step")
def _step(count: int) -> None:
    from sparsegrad_cli.training.optimizer_steps import OptimizerSteps

    patch_call(OptimizerSteps, "_backward", count, after=_die)


@kill_point(
    "interrupted", "Ctrl-C (SIGINT) in a step that ends with an evaluation and a checkpoint"
)
def _interrupted(count: int) -> None:
    from sparsegrad_cli.training.optimizer_steps import OptimizerSteps

    patch_call(
        OptimizerSteps,
        "_backward",
        count,
        after=lambda *args: os.kill(os.getpid(), signal.SIGINT),
    )


@kill_point("interrupted-twice", "Ctrl-C twice (SIGINT) in a step, which stops at once")
def _interrupted_twice(count: int) -> None:
    from sparsegrad_cli.training.optimizer_steps import OptimizerSteps

    def press(*args: Any) -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    patch_call(OptimizerSteps, "_backward", count, after=press)


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


@kill_point("interrupted-calibrating", "SIGTERM during calibration")
def _interrupted_calibrating(count: int) -> None:
    from sparsegrad_cli.calibration import calibrate as calibration

    _asked_to_stop(calibration, "gradient_step", count)


@kill_point("interrupted-calibrating-twice", "SIGTERM twice during calibration")
def _interrupted_calibrating_twice(count: int) -> None:
    from sparsegrad_cli.calibration import calibrate as calibration

    _asked_to_stop(calibration, "gradient_step", count, times=2)


@kill_point("interrupted-warming", "SIGTERM while the head warms up")
def _interrupted_warming(count: int) -> None:
    from sparsegrad_cli.calibration import warmup

    _asked_to_stop(warmup, "gradient_step", count)


@kill_point("interrupted-decomposing", "SIGTERM while bases are computed")
def _interrupted_decomposing(count: int) -> None:
    from sparsegrad_cli.numerics.sketch import SketchStream

    _asked_to_stop(SketchStream, "basis", count)


@kill_point("interrupted-measuring", "SIGTERM while the energy of held-out gradients is measured")
def _interrupted_measuring(count: int) -> None:
    from sparsegrad_cli.calibration import diagnostics

    _asked_to_stop(diagnostics, "gradient_step", count)


@kill_point("interrupted-evaluating", "SIGTERM during an evaluation")
def _interrupted_evaluating(count: int) -> None:
    from sparsegrad_cli.training import loaders

    _asked_to_stop(loaders, "ValidationBatch", count)


@kill_point("interrupted-judged", "SIGTERM after the last batch of an evaluation")
def _interrupted_judged(count: int) -> None:
    from sparsegrad_cli.training.evaluation import Evaluator

    patch_call(
        Evaluator,
        "judge_splits",
        count,
        after=lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGTERM),
    )


@kill_point("interrupted-recording", "SIGTERM in the last phase, before anything is evaluated")
def _interrupted_recording(count: int) -> None:
    from sparsegrad_cli.training import outcome

    _asked_to_stop(outcome, "sparsity_map", count)


@kill_point("interrupted-saving", "SIGTERM while the adapter is written")
def _interrupted_saving(count: int) -> None:
    from sparsegrad_cli.training import outcome

    _asked_to_stop(outcome, "save_adapter", count)


@kill_point("interrupted-loading", "SIGTERM while model and data are loaded")
def _interrupted_loading(count: int) -> None:
    from sparsegrad_cli.tasks import setup

    _asked_to_stop(setup, "make_setup", count)


@kill_point("interrupted-probing", "SIGTERM while memory is measured in a step")
def _interrupted_probing(count: int) -> None:
    from sparsegrad_cli.training import memory_probe

    _asked_to_stop(memory_probe, "longest_batch", count)


@kill_point("line-torn", "half of a line of steps.jsonl is written")
def _line_torn(count: int) -> None:
    from sparsegrad_cli.training.step_log import StepLog

    def tear(log: Any, line: Any) -> None:
        with log._path.open("a") as file:
            file.write(json.dumps(line)[:9])
        kill_self()

    patch_call(StepLog, "_append", count, before=tear)


@kill_point("evaluated", "after an evaluation, before its checkpoint")
def _evaluated(count: int) -> None:
    from sparsegrad_cli.training.evaluation import Evaluator

    patch_call(Evaluator, "evaluate", count, after=_die)


@kill_point("checkpoint-begun", "the checkpoint folder exists and is empty")
def _checkpoint_begun(count: int) -> None:
    from sparsegrad_cli.training import checkpoint

    patch_call(checkpoint, "write_checkpoint", count, before=_die)


@kill_point("checkpoint-torn", "half of the first checkpoint file is written")
def _checkpoint_torn(count: int) -> None:
    import safetensors.torch

    patch_call(safetensors.torch, "save_file", count, after=_torn, when=_writes("trainable"))


@kill_point("checkpoint-written", "the checkpoint is complete, under its temporary name")
def _checkpoint_written(count: int) -> None:
    patch_call(Path, "replace", count, before=_die, when=_renames("checkpoint-"))


@kill_point("checkpoint-renamed", "the checkpoint is renamed, the previous one not yet removed")
def _checkpoint_renamed(count: int) -> None:
    patch_call(Path, "replace", count, after=_die, when=_renames("checkpoint-"))


@kill_point("dropping", "an old checkpoint is half removed")
def _dropping(count: int) -> None:
    import shutil

    def half(folder: Path, **options: Any) -> None:
        next(Path(folder).iterdir()).unlink()
        kill_self()

    def full(folder: Path, **options: Any) -> bool:
        return Path(folder).name.endswith(".removed") and Path(folder).is_dir()

    patch_call(shutil, "rmtree", count, before=half, when=full)


@kill_point("trained", "after the last step, before the final evaluation")
def _trained(count: int) -> None:
    from sparsegrad_cli.training import loop

    patch_call(loop, "record_outcome", count, before=_die)


@kill_point("adapter-torn", "half of adapter.safetensors is written")
def _adapter_torn(count: int) -> None:
    import safetensors.torch

    patch_call(safetensors.torch, "save_file", count, after=_torn, when=_writes("adapter"))


@kill_point("adapter-renamed", "the adapter is renamed, run.json does not record it yet")
def _adapter_renamed(count: int) -> None:
    patch_call(Path, "replace", count, after=_die, when=_renames("adapter"))


@kill_point("reporting", "run.json says done, the report is not written")
def _reporting(count: int) -> None:
    from sparsegrad_cli.run import open_run

    patch_call(open_run, "write_report", count, before=_die)


@kill_point("reporting-begins", "Ctrl-C (SIGINT) just after run.json says done")
def _reporting_begins(count: int) -> None:
    from sparsegrad_cli.records.store import RunWriter

    patch_call(RunWriter, "finish", count, after=lambda *args: os.kill(os.getpid(), signal.SIGINT))


@kill_point("reporting-interrupted", "Ctrl-C (SIGINT) while the report is written")
def _reporting_interrupted(count: int) -> None:
    from sparsegrad_cli.report import render

    patch_call(
        render, "write_run_report", count, before=lambda *args: os.kill(os.getpid(), signal.SIGINT)
    )


@kill_point("export-begun", "the export folder exists")
def _export_begun(count: int) -> None:
    from sparsegrad_cli.export import export_run as session

    patch_call(session._Export, "fill", count, before=_die)


@kill_point("export-torn", "half of the exported model.safetensors is written")
def _export_torn(count: int) -> None:
    from transformers import modeling_utils

    patch_call(modeling_utils, "safe_save_file", count, after=_torn)


@kill_point("export-written", "the export is complete, under its temporary name")
def _export_written(count: int) -> None:
    patch_call(Path, "replace", count, before=_die, when=_renames("export-"))


@kill_point("export-renamed", "the export is renamed, nothing is printed yet")
def _export_renamed(count: int) -> None:
    patch_call(Path, "replace", count, after=_die, when=_renames("export-"))


# --- points that limit a resource; the count says how much is left


def _limit_memory(mebibytes: int) -> None:
    """Limit the address space to what the process has now plus ``mebibytes``.

    Large blocks get a mapping of their own. In glibc's heap, one small block behind a freed one
    would keep its addresses, and how much of the limit that takes differs from run to run.
    """
    import ctypes
    import gc
    import resource

    m_mmap_threshold = -3
    ctypes.CDLL(None).mallopt(m_mmap_threshold, 2**20)
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + mebibytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


@kill_point("short-of-memory", "MiB left after model and data are loaded")
def _short_of_memory(count: int) -> None:
    from sparsegrad_cli.training import fine_tuning

    patch_call(fine_tuning, "load", 1, after=lambda *args: _limit_memory(count))


@kill_point("short-of-memory-later", "MiB left when the second evaluation begins")
def _short_of_memory_later(count: int) -> None:
    from sparsegrad_cli.training.evaluation import Evaluator

    patch_call(Evaluator, "evaluate", 2, before=lambda *args, **kwargs: _limit_memory(count))


@kill_point("small-files", "largest file size in KiB, like a full disk")
def _small_files(count: int) -> None:
    _limit_files(count)


@kill_point("reporting-full", "largest file size in KiB after the run is done")
def _reporting_full(count: int) -> None:
    from sparsegrad_cli.run import open_run

    patch_call(open_run, "write_report", 1, before=lambda *args: _limit_files(count))


def _limit_files(kibibytes: int) -> None:
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kibibytes * 1024, kibibytes * 1024))


@kill_point("clock-back", "hours that the clock jumps back at every reading")
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
