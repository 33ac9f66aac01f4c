"""Checkpoints without pickle: tensors in safetensors, the rest in JSON; whole or not at all.

checkpoint-N/
  trainable.safetensors   every parameter that trains
  optimizer.safetensors   state tensors, named "<parameter number>/<key>"
  random.safetensors      states of torch's (CPU, CUDA) and numpy's generators
  state.json              optimizer groups, scheduler, python's generator, extras of the run
  trainer_state.json      transformers.TrainerState

A checkpoint is written beside its place and renamed into it, so that a full disk or a killed
process leaves the one before whole.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsegrad_cli.errors import DiskError, FileFormatError

TRAINABLE, OPTIMIZER, RANDOM, STATE = (
    "trainable.safetensors",
    "optimizer.safetensors",
    "random.safetensors",
    "state.json",
)
_FORMAT = 1
_STATE_KEYS = {"optimizer_groups", "optimizer_numbers", "scheduler", "random", "extras"}


_RESUME = "free some space, then go on with --resume: the checkpoint before is whole"


def write_folder(folder: Path, fill: Callable[[Path], None], *, fix: str = _RESUME) -> None:
    """Fill a new folder under a temporary name, then rename it into place.

    Args:
        fix: what to do where the disk refuses.

    Raises:
        DiskError: something could not be written; nothing is left of the attempt, and what stood
            at ``folder`` before is untouched.
    """
    partial = folder.with_name(folder.name + ".partial")
    before = folder.with_name(folder.name + ".before")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        fill(partial)
        if folder.exists():  # moved aside, so that a failing rename does not lose it
            shutil.rmtree(before, ignore_errors=True)
            folder.replace(before)
        try:
            partial.replace(folder)
        except OSError:
            if before.exists():
                before.replace(folder)
            raise
        shutil.rmtree(before, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise DiskError(
            f"{folder.name} could not be written: {error}",
            where=str(folder),
            fix=fix,
        ) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """safetensors, contiguous, from whatever device; one file, written then renamed.

    Raises:
        DiskError: it could not be written; a file that stood there before is untouched.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        _save(ready, partial, metadata)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise DiskError(
            f"{path.name} could not be written: {error}", where=str(path), fix="free some space"
        ) from error


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """save_file, readable by whom other files in the folder are: safetensors itself makes 0600."""
    like = path.with_name(path.name + ".mode")
    like.touch()
    mode = like.stat().st_mode & 0o777
    like.unlink()
    save_file(tensors, path, metadata)
    path.chmod(mode)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        FileFormatError: the file is missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise FileFormatError(
            f"cannot be read: {error}",
            where=str(path),
            fix="remove the damaged file or folder; an earlier checkpoint may be whole",
        ) from error


def save_training_state(
    folder: Path,
    trainable: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    extras: Mapping[str, Any],
) -> None:
    """Write all but trainer_state.json into ``folder`` (not atomic: see :func:`write_folder`)."""
    _save({k: t.cpu().contiguous() for k, t in trainable.items()}, folder / TRAINABLE)
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for number, entry in state["state"].items():
        for key, value in entry.items():
            if isinstance(value, Tensor):
                tensors[f"{number}/{key}"] = value.detach().cpu().contiguous()
            else:
                numbers[f"{number}/{key}"] = value
    _save(tensors, folder / OPTIMIZER)
    random_tensors, random_json = _random_state()
    _save(random_tensors, folder / RANDOM)
    content = {
        "format": _FORMAT,
        "optimizer_groups": state["param_groups"],
        "optimizer_numbers": numbers,
        "scheduler": _plain(scheduler.state_dict()),
        "random": random_json,
        "extras": dict(extras),
    }
    (folder / STATE).write_text(json.dumps(content), encoding="utf-8")


def load_state_json(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint.

    Raises:
        FileFormatError: missing, damaged, or of another format.
    """
    path = folder / STATE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileFormatError(
            f"cannot be read: {error}", where=str(path), fix="remove the damaged checkpoint"
        ) from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise FileFormatError("is no checkpoint of this version", where=str(path))
    missing = sorted(_STATE_KEYS - content.keys())
    if missing:
        raise FileFormatError(
            f"is incomplete: {', '.join(missing)} missing",
            where=str(path),
            fix="remove the damaged checkpoint",
        )
    return content


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    """Restore optimizer and scheduler, bit for bit.

    Raises:
        FileFormatError: the files are damaged or belong to another set of parameters.
    """
    content = load_state_json(folder)
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in read_tensors(folder / OPTIMIZER).items():
        number, key = name.split("/", 1)
        state.setdefault(int(number), {})[key] = tensor
    for name, value in content["optimizer_numbers"].items():
        number, key = name.split("/", 1)
        state.setdefault(int(number), {})[key] = value
    groups = content["optimizer_groups"]
    for group in groups:
        if "betas" in group:
            group["betas"] = tuple(group["betas"])
    try:
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    except (ValueError, KeyError) as error:
        raise FileFormatError(
            f"the optimizer state does not fit this run: {error}", where=str(folder)
        ) from error
    scheduler.load_state_dict(content["scheduler"])


def load_random(folder: Path) -> None:
    """Restore python's, numpy's and torch's random state.

    Raises:
        FileFormatError: the files are damaged.
    """
    content = load_state_json(folder)["random"]
    tensors = read_tensors(folder / RANDOM)
    try:
        version, internal, gauss = content["python"]
        name, position, has_gauss, cached = content["numpy"]
        numpy_keys = tensors["numpy"].numpy().astype(np.uint32)
        torch.set_rng_state(tensors["torch"])
        random.setstate((version, tuple(internal), gauss))
        np.random.set_state((name, numpy_keys, position, has_gauss, cached))
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise FileFormatError(
            f"the random state cannot be restored: {error}",
            where=str(folder),
            fix="remove the damaged checkpoint",
        ) from error
    cuda = [tensors[k] for k in sorted(t for t in tensors if t.startswith("cuda/"))]
    if cuda and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(cuda)


def _random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    state: Any = np.random.get_state()
    name, keys, position, has_gauss, cached = state
    tensors = {
        "torch": torch.get_rng_state(),
        # safetensors knows uint32, but older readers do not: int64 holds it exactly.
        "numpy": torch.from_numpy(keys.astype(np.int64)),
    }
    if torch.cuda.is_available():
        states = torch.cuda.get_rng_state_all()
        tensors.update({f"cuda/{number:03d}": state for number, state in enumerate(states)})
    numpy_state = [str(name), int(position), int(has_gauss), float(cached)]
    return tensors, {"python": list(random.getstate()), "numpy": numpy_state}


def _plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's state without what JSON cannot hold (functions, which are rebuilt)."""
    plain = {}
    for key, value in state.items():
        try:
            json.dumps(value)
        except TypeError:
            continue
        plain[key] = value
    return plain


def last_checkpoint(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run, by step; folders without state.json are passed over."""
    found = [
        path
        for path in run_dir.glob("checkpoint-*")
        if (number := path.name.removeprefix("checkpoint-")).isascii()
        and number.isdigit()  # of ASCII: int() takes no superscripts
        and (path / STATE).is_file()
    ]
    return max(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)
