"""When memory runs out: where, what was the largest, what would have fitted (tried and measured).

The failed step is done again on the longest rows with every module watched and every tensor
counted, then with half the rows, a quarter and so on, until a batch fits. The run is over by then:
nothing of this reaches its files.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable
from types import FrameType, TracebackType

import torch
from torch import nn

from sparsegrad_cli import distributed
from sparsegrad_cli.error_mapping import first_line, is_out_of_memory
from sparsegrad_cli.errors import OutOfMemoryError
from sparsegrad_cli.memory.storage_tracker import LiveTensor
from sparsegrad_cli.recipe.schema import Recipe
from sparsegrad_cli.report.units import format_bytes
from sparsegrad_cli.training.oom_measure import Attempt, forget
from sparsegrad_cli.training.oom_trials import Situation, calibrating, evaluating, training

TRAIN_KEY = "train.per_device_train_batch_size"
EVAL_KEY = "train.per_device_eval_batch_size"
CALIBRATION_KEY = "calibration.batch_size"
_UNITS = {"bytes": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}
_WORDS = {
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
# Where no batch is to blame: what is, and what to do.
_NO_BATCH = {
    "load": ("model.name", "a smaller model, or model.dtype=bfloat16, which takes half"),
    "prepare": (
        "method",
        "calibration.basis_per=kind shares bases, a smaller method.rank makes them smaller",
    ),
    "checkpoint": (
        "the copy that a checkpoint is written from",
        "free some memory, then go on with --resume",
    ),
}


def explain(error: BaseException, recipe: Recipe, known: Situation) -> OutOfMemoryError:
    """The error to show. Takes the frames of ``error`` apart, so that there is room to look.

    Args:
        error: for which :func:`may_be_out_of_memory` holds.
    """
    reason, asked, sure = first_line(error), _asked(str(error)), is_out_of_memory(error)
    model = known.setup.model if known.setup else None
    phase, module = _whereabouts(error.__traceback__, model, known.at)
    forget(error)
    if known.trainer is not None:
        known.trainer.model.zero_grad(set_to_none=True)
    key, size, try_size = _what_to_try(phase, recipe, known)
    failed, fits = None, None
    # Processes that train together would wait for one that tries something by itself.
    if try_size is not None and distributed.world_size() == 1:
        try:
            failed, fits = _search(size, try_size, sure=sure)
        except Exception as another:  # no room even to look: the first error is the one to show
            forget(another)
    if failed is not None and failed.phase == phase and not module:
        module = failed.module
    amount = f": {format_bytes(asked)} more were asked for" if asked else f": {reason}"
    inside = f", in {module}" if module else ""
    tensors = failed.tensors if failed is not None else ()
    return OutOfMemoryError(
        f"memory ran out in {_WORDS[phase]}{inside}{amount}",
        where=f"{key} = {size}" if size else key,
        fix=_fix(key, fits, recipe, tried=failed is not None),
        more=_largest(tensors),
        details={
            "phase": phase,
            "module": module or None,
            "asked_bytes": asked,
            "tensors": [tensor.to_json() for tensor in tensors],
            "fits": None if fits is None else {**_settings(key, fits[0], recipe), **_peak(fits)},
        },
    )


def _whereabouts(at: TracebackType | None, model: nn.Module | None, phase: str) -> tuple[str, str]:
    """Phase and innermost module of a traceback: by the objects whose methods were running."""
    names = {id(m): n or type(m).__name__ for n, m in model.named_modules()} if model else {}
    found, module = phase if phase != "train" else "forward", ""
    while at is not None:
        code, owner = at.tb_frame.f_code, _self_of(at.tb_frame)
        if isinstance(owner, nn.Module):
            module = names.get(id(owner), module)
        elif isinstance(owner, torch.optim.Optimizer):
            found, module = "optimizer", ""
        elif phase == "train" and code.co_name in ("evaluate", "evaluation_loop"):
            found = "evaluate"
        elif code.co_name == "_save_checkpoint":
            found = "checkpoint"
        elif code.co_name == "backward" and found == "forward":
            found, module = "backward", ""
        at = at.tb_next
    return found, module


def _self_of(frame: FrameType) -> object:
    """The object whose method a frame runs; nothing is kept alive by having looked."""
    if not frame.f_code.co_flags & inspect.CO_OPTIMIZED:
        return None
    names = frame.f_locals
    owner = names.get("self")
    if isinstance(names, dict):  # before python 3.13 a copy, which would outlive the frame's own
        names.clear()
    return owner


def _asked(text: str) -> int | None:
    """Bytes of the allocation that failed, as torch says them."""
    said = re.search(r"allocate ([\d.]+) (bytes|KiB|MiB|GiB)", text)
    return int(float(said[1]) * _UNITS[said[2]]) if said else None


def _what_to_try(
    phase: str, recipe: Recipe, known: Situation
) -> tuple[str, int, Callable[[int], Attempt] | None]:
    """The key to blame, its value, and how another value is tried."""
    train, setup, trainer = recipe.train, known.setup, known.trainer
    if setup is None or phase in _NO_BATCH:
        phase = phase if setup else "load"
        return _NO_BATCH[phase][0], 0, None
    if phase in ("calibrate", "energy"):
        if known.calibrate is None:
            return CALIBRATION_KEY, known.calibration_batch, None
        return CALIBRATION_KEY, known.calibration_batch, calibrating(setup, known.calibrate)
    if phase == "evaluate":
        size = min(train.per_device_eval_batch_size, max(map(len, setup.validation.values())))
        return EVAL_KEY, size, evaluating(setup, known) if trainer else None
    size = min(train.per_device_train_batch_size, len(setup.train_data))
    return TRAIN_KEY, size, training(setup, known) if trainer else None


def _search(
    size: int, try_size: Callable[[int], Attempt], *, sure: bool
) -> tuple[Attempt, tuple[int, Attempt] | None]:
    """The batch as it was, and the largest of its halves, quarters and so on that fits.

    Where memory is short for sure, a batch at which oneDNN fails without a reason is tried without
    oneDNN: it wants address space of its own for the code that it makes, and what has been freed
    since may lie in the heap, which does not give it back. Unknown whether memory is short, the
    whole batch without oneDNN tells.

    Args:
        sure: the error that this is about was a failed allocation.
    """
    failed = try_size(size)
    short = sure or not failed.unsure or not _without_onednn(size, try_size).fits
    while size > 1:
        size //= 2
        found = try_size(size)
        if found.unsure and short:
            found = _without_onednn(size, try_size)
        if found.fits:
            return failed, (size, found)
    return failed, None


def _without_onednn(size: int, try_size: Callable[[int], Attempt]) -> Attempt:
    with warnings.catch_warnings():
        # flags() sets what TF32 may do as well, and is told that this is no Intel GPU.
        warnings.filterwarnings("ignore", "TF32 acceleration on top of oneDNN")
        with torch.backends.mkldnn.flags(enabled=False):
            return try_size(size)


def _largest(tensors: tuple[LiveTensor, ...]) -> list[str]:
    lines = ["the largest tensors then:"] if tensors else []
    for tensor in tensors:
        shape = " x ".join(map(str, tensor.shape)) or "a number"
        words = tensor.category.replace("_", " ")
        lines.append(
            f"  {format_bytes(tensor.nbytes)}  {words}, {shape} {tensor.dtype}"
            + (f", {tensor.of}" if tensor.of else "")
        )
    return lines


def _settings(key: str, size: int, recipe: Recipe) -> dict[str, int]:
    """Keys of a batch that fits; as many examples a step as before."""
    settings = {key: size}
    if key == TRAIN_KEY:
        train = recipe.train
        examples = train.per_device_train_batch_size * train.gradient_accumulation_steps
        settings["train.gradient_accumulation_steps"] = -(-examples // size)
    return settings


def _peak(fits: tuple[int, Attempt]) -> dict[str, int]:
    return {"peak_bytes": fits[1].peak_bytes}


def _fix(key: str, fits: tuple[int, Attempt] | None, recipe: Recipe, *, tried: bool) -> str:
    if fits is not None:
        size, found = fits
        words = " ".join(f"{k}={v}" for k, v in _settings(key, size, recipe).items())
        return (
            f"a batch of {size} fits, {format_bytes(found.peak_bytes)} at its peak on the longest "
            f"rows: {words}"
        )
    advice = dict(_NO_BATCH.values())
    if key in advice:
        return advice[key]
    less = "no batch fits:" if tried else f"a smaller {key};"
    return f"{less} {_less(key, recipe)} make it smaller"


def _less(key: str, recipe: Recipe) -> str:
    """The settings that the recipe has not used yet, of those that save memory in this phase."""
    train, method, calibration = recipe.train, recipe.method, recipe.calibration
    ways = ["a shorter task.max_length"]
    if not train.gradient_checkpointing and key != EVAL_KEY:
        ways.insert(0, "train.gradient_checkpointing=true")
    if recipe.model.dtype == "float32":
        ways.append("model.dtype=bfloat16")
    if key == CALIBRATION_KEY:
        if calibration.basis_per == "layer":
            ways.append("calibration.basis_per=kind")
        if method.thin_bases and calibration.decomposition == "exact":
            ways.append("calibration.decomposition=randomized")
    return ways[0] if len(ways) == 1 else f"{', '.join(ways[:-1])} or {ways[-1]}"
