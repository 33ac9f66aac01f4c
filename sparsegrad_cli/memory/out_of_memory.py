"""Explain a failed allocation: where it happened, the largest tensors, and a batch that fits.

The failed step is run again on the longest rows, with every module traced and every tensor counted.
Then it is run with half the rows, a quarter and so on, until a batch fits with an eighth of its
peak to spare. The run has already ended: weights and optimizer state are not restored, and its
files do not change.
"""

from __future__ import annotations

import ctypes
import gc
import inspect
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import nn

from sparsegrad_cli import distributed
from sparsegrad_cli.error_mapping import first_line, is_out_of_memory
from sparsegrad_cli.errors import OutOfMemoryError
from sparsegrad_cli.memory.meter import MemoryMeter
from sparsegrad_cli.models.module_trace import trace_location
from sparsegrad_cli.recipe.schema import Recipe
from sparsegrad_cli.records.run import LiveTensor
from sparsegrad_cli.report.units import format_bytes

TRAIN_KEY = "train.per_device_train_batch_size"
EVAL_KEY = "train.per_device_eval_batch_size"
CALIBRATION_KEY = "calibration.batch_size"
_TENSORS_SHOWN = 5
_SPARE = 8  # Another process may need more: libraries differ by a few percent from run to run.
_UNITS = {"bytes": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}
_PHASES = {
    "load": "loading",
    "calibrate": "calibration",
    "energy": "measuring the energy of held-out gradients",
    "prepare": "preparing the model for the method",
    "forward": "the forward pass",
    "backward": "the backward pass",
    "optimizer": "the optimizer step",
    "evaluate": "evaluation",
    "checkpoint": "writing a checkpoint",
}

Phase = Callable[[str], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Attempt:
    """The outcome of running some work again.

    Attributes:
        fits: whether the work finished.
        peak_bytes: peak memory, up to the failure if the work failed.
        phase: the phase of the memory report in which it ended.
        module: the module that was running then; in a backward pass, the one whose gradient had
            arrived last. Empty outside the model.
        tensors: the largest tensors that were alive when it failed, in descending order of size.
    """

    fits: bool
    peak_bytes: int
    phase: str
    module: str
    tensors: tuple[LiveTensor, ...] = ()


@dataclass(frozen=True)
class Trial:
    """How to run a phase again with another batch size.

    Attributes:
        key: the recipe's key for the batch size.
        size: the batch size that failed.
        attempt: runs the phase with a batch size.
    """

    key: str
    size: int
    attempt: Callable[[int], Attempt]


def attempt(model: nn.Module, meter: MemoryMeter, work: Callable[[Phase], None]) -> Attempt:
    """Run some work and return whether the memory suffices.

    Args:
        model: the model, whose modules are traced.
        meter: a new meter that watches the model.
        work: the work; receives a function that returns the context of a phase.
    """
    phase_name = module_name = ""

    def phase(name: str) -> AbstractContextManager[Any]:
        nonlocal phase_name
        phase_name = name
        return meter.phase(name)

    def arrive(name: str) -> None:
        nonlocal module_name
        module_name = name
        meter.set_location(name)

    tensors: tuple[LiveTensor, ...] = ()
    fits = True
    try:
        with trace_location(model, arrive):
            work(phase)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        fits = False
        tensors = tuple(meter.largest(_TENSORS_SHOWN))  # The error's frames still hold them.
        release(error)
    return Attempt(fits, meter.report().peak_bytes or 0, phase_name, module_name, tensors)


def release(error: BaseException) -> None:
    """Free what the frames of an error hold, and return unused memory to the OS."""
    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        seen.add(id(at))
        if at.__traceback__ is not None:
            traceback.clear_frames(at.__traceback__)
            at.__traceback__ = None
        at = at.__cause__ or at.__context__
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with suppress(OSError, AttributeError):  # Gaps in glibc's heap cannot hold larger tensors.
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def out_of_memory_explained(
    recipe: Recipe,
    phase: str,
    model: nn.Module | None = None,
    trials: Mapping[str, Trial] | None = None,
) -> Iterator[None]:
    """Turn a failed allocation inside into an OutOfMemoryError that names a batch that fits.

    Args:
        recipe: the recipe of the run.
        phase: ``load``, ``calibrate``, ``energy``, ``prepare``, ``evaluate`` or ``train``. Within
            ``train``, the traceback distinguishes forward, backward, optimizer, evaluation and
            checkpoint.
        model: the model; None before it is loaded.
        trials: phase -> how to run it again, for ``calibrate``, ``evaluate`` and ``train``; none by
            default.

    Raises:
        OutOfMemoryError: memory ran out inside.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise _explained(error, recipe, phase, model, trials or {}) from None


def _explained(
    error: BaseException,
    recipe: Recipe,
    phase: str,
    model: nn.Module | None,
    trials: Mapping[str, Trial],
) -> OutOfMemoryError:
    """Return the error to raise. Frees the frames of ``error`` first, to make room for trials."""
    reason, requested = first_line(error), _requested_bytes(str(error))
    phase, module = _whereabouts(error.__traceback__, model, phase)
    release(error)
    if model is not None:
        model.zero_grad(set_to_none=True)
    trial = trials.get(_trial_of(phase))
    failed, fits, trouble = None, None, []
    # In a distributed run, the other processes would wait for the one that runs a trial.
    if trial is not None and distributed.world_size() == 1:
        try:
            failed, fits = _search(trial, model)
        except Exception as another:
            # The user must learn of the first error, so this one is only a line of its message.
            said = "".join(traceback.format_exception_only(another)).splitlines()[0]
            trouble = [f"the search for a batch that fits failed: {said}"]
            release(another)
    if failed is not None and failed.phase == phase and not module:
        module = failed.module
    amount = f": {format_bytes(requested)} more were requested" if requested else f": {reason}"
    inside = f", in {module}" if module else ""
    tensors = failed.tensors if failed is not None else ()
    if trial is None:
        where, fix = _without_batch(phase, recipe)
    else:
        where, fix = f"{trial.key} = {trial.size}", _fix(trial, failed, fits, recipe)
    found = None
    if trial is not None and fits is not None:
        found = {**_settings(trial.key, fits[0], recipe), "peak_bytes": fits[1].peak_bytes}
    return OutOfMemoryError(
        f"memory ran out in {_PHASES[phase]}{inside}{amount}",
        where=where,
        fix=fix,
        more=[*_largest(tensors), *trouble],
        details={
            "phase": phase,
            "module": module or None,
            "asked_bytes": requested,
            "tensors": [tensor.to_json() for tensor in tensors],
            "fits": found,
        },
    )


def _without_batch(phase: str, recipe: Recipe) -> tuple[str, str]:
    """Return the setting to change, and how, if the batch size does not matter."""
    if phase == "checkpoint":
        where = "the copy that a checkpoint is written from"
        return where, "free some memory, then continue with --resume"
    ways = ["a smaller model"]
    if recipe.model.dtype == "float32":
        ways.append("model.dtype=bfloat16, which takes half")
    if phase != "prepare":
        return "model.name", " or ".join(ways)
    return "method", _any_of([*recipe.method.memory_savers(recipe, phase), "a smaller model"])


def _trial_of(phase: str) -> str:
    """Return the trial that runs a phase again."""
    if phase in ("forward", "backward", "optimizer"):
        return "train"
    return "calibrate" if phase == "energy" else phase


def _whereabouts(at: TracebackType | None, model: nn.Module | None, phase: str) -> tuple[str, str]:
    """Return the phase and innermost module of a traceback, from the objects whose methods ran."""
    names = {id(m): n or type(m).__name__ for n, m in model.named_modules()} if model else {}
    found, module = phase if phase != "train" else "forward", ""
    while at is not None:
        code, owner = at.tb_frame.f_code, _self_of(at.tb_frame)
        if isinstance(owner, nn.Module):
            module = names.get(id(owner), module)
        elif isinstance(owner, torch.optim.Optimizer):
            found, module = "optimizer", ""
        elif phase == "train" and code.co_name == "judge_splits":
            found = "evaluate"
        elif code.co_name == "_save_checkpoint":
            found = "checkpoint"
        elif code.co_name == "backward" and found == "forward":
            found, module = "backward", ""
        at = at.tb_next
    return found, module


def _self_of(frame: FrameType) -> object:
    """Return the object whose method a frame runs, without keeping anything alive."""
    if not frame.f_code.co_flags & inspect.CO_OPTIMIZED:
        return None
    names = frame.f_locals
    owner = names.get("self")
    if isinstance(names, dict):  # Before Python 3.13, a copy that outlives the frame.
        names.clear()
    return owner


def _requested_bytes(text: str) -> int | None:
    """Return the size of the allocation that failed, as torch states it."""
    said = re.search(r"allocate ([\d.]+) (bytes|KiB|MiB|GiB)", text)
    return int(float(said[1]) * _UNITS[said[2]]) if said else None


def _search(trial: Trial, model: nn.Module | None) -> tuple[Attempt, tuple[int, Attempt] | None]:
    """Repeat the failed attempt, then halve the batch until it fits; return both attempts."""
    size = trial.size
    failed = trial.attempt(size)
    while size > 1:
        size //= 2
        found = trial.attempt(size)
        if found.fits and _fits_with_less(trial, size, found.peak_bytes, model):
            return failed, (size, found)
    return failed, None


def _fits_with_less(trial: Trial, size: int, peak_bytes: int, model: nn.Module | None) -> bool:
    """Return whether a batch still fits when an eighth of its peak is taken away."""
    weight = next(model.parameters(), None) if model is not None else None
    try:
        taken = torch.empty(
            peak_bytes // _SPARE,
            dtype=torch.uint8,
            device=weight.device if weight is not None else None,
        )
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        release(error)
        return False
    fits = trial.attempt(size).fits
    del taken
    return fits


def _largest(tensors: Sequence[LiveTensor]) -> list[str]:
    lines = ["the largest tensors then:"] if tensors else []
    for tensor in tensors:
        shape = " x ".join(map(str, tensor.shape)) or "a number"
        category = tensor.category.replace("_", " ")
        lines.append(
            f"  {format_bytes(tensor.bytes)}  {category}, {shape} {tensor.dtype}"
            + (f", {tensor.of}" if tensor.of else "")
        )
    return lines


def _settings(key: str, size: int, recipe: Recipe) -> dict[str, int]:
    """Return the settings of a batch that fits, with as many examples per step as before."""
    settings = {key: size}
    if key == TRAIN_KEY:
        train = recipe.train
        examples = train.per_device_train_batch_size * train.gradient_accumulation_steps
        settings["train.gradient_accumulation_steps"] = -(-examples // size)
    return settings


def _fix(
    trial: Trial, failed: Attempt | None, fits: tuple[int, Attempt] | None, recipe: Recipe
) -> str:
    if fits is not None:
        size, found = fits
        words = " ".join(f"{k}={v}" for k, v in _settings(trial.key, size, recipe).items())
        return (
            f"a batch of {size} fits, {format_bytes(found.peak_bytes)} at its peak on the longest "
            f"rows: {words}"
        )
    less = "no batch fits:" if failed is not None else f"a smaller {trial.key};"
    return f"{less} {_memory_savers(trial.key, recipe)} make it smaller"


def _memory_savers(key: str, recipe: Recipe) -> str:
    """List the settings that save memory in this phase and that the recipe does not use yet."""
    train = recipe.train
    ways = ["a shorter task.max_length"]
    if not train.gradient_checkpointing and key != EVAL_KEY:
        ways.insert(0, "train.gradient_checkpointing=true")
    if recipe.model.dtype == "float32":
        ways.append("model.dtype=bfloat16")
    if key == CALIBRATION_KEY:
        ways += recipe.method.memory_savers(recipe, "calibrate")
    return _any_of(ways)


def _any_of(ways: Sequence[str]) -> str:
    return ways[0] if len(ways) == 1 else f"{', '.join(ways[:-1])} or {ways[-1]}"
