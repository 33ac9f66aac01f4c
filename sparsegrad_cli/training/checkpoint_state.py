"""What a checkpoint holds, without pickle: tensors in safetensors, the rest in JSON.

checkpoint-N/
  trainable.safetensors   every parameter that trains
  optimizer.safetensors   state tensors, named "<parameter number>/<key>"
  random.safetensors      states of torch's (CPU, CUDA) and numpy's generators, "<process>/<key>"
  state.json              optimizer groups, scheduler, python's generators, extras of the run
  trainer_state.json      transformers.TrainerState
  manifest.json           size and sha256 of each of these (training/checkpoint_manifest.py)

How it is written, found again and dropped: training/checkpoint_folder.py.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from sparsegrad_cli import distributed
from sparsegrad_cli.errors import FileFormatError
from sparsegrad_cli.io.atomic import read_tensors, write_tensors
from sparsegrad_cli.models.sharded_tensors import gathered, shard_like

TRAINABLE, OPTIMIZER, RANDOM, STATE = (
    "trainable.safetensors",
    "optimizer.safetensors",
    "random.safetensors",
    "state.json",
)
RandomState = tuple[dict[str, Tensor], dict[str, Any]]
_FORMAT = 1
_STATE_KEYS = {"optimizer_groups", "optimizer_numbers", "scheduler", "random", "extras"}


def save_training_state(
    folder: Path,
    trainable: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    extras: Mapping[str, Any],
    drawn: Sequence[RandomState] | None = None,
    whole: Mapping[str, Any] | None = None,
) -> None:
    """Write all but trainer_state.json and the manifest into ``folder``; not atomic.

    Args:
        drawn: :func:`random_state` of each process that trains; of this one, which is alone.
        whole: :func:`whole_state` of the optimizer, where several processes had to be asked for it.
    """
    write_tensors({k: t.cpu().contiguous() for k, t in trainable.items()}, folder / TRAINABLE)
    state = optimizer.state_dict() if whole is None else whole
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for number, entry in state["state"].items():
        for key, value in entry.items():
            if isinstance(value, Tensor):
                tensors[f"{number}/{key}"] = value.detach().cpu().contiguous()
            else:
                numbers[f"{number}/{key}"] = value
    write_tensors(tensors, folder / OPTIMIZER)
    states = [random_state()] if drawn is None else drawn
    random_tensors = {
        f"{number}/{key}": tensor
        for number, (of_one, _) in enumerate(states)
        for key, tensor in of_one.items()
    }
    write_tensors(random_tensors, folder / RANDOM)
    content = {
        "format": _FORMAT,
        "optimizer_groups": state["param_groups"],
        "optimizer_numbers": numbers,
        "scheduler": _plain(scheduler.state_dict()),
        "random": [numbers for _, numbers in states],
        "extras": dict(extras),
    }
    (folder / STATE).write_text(json.dumps(content), encoding="utf-8")


def whole_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Its state_dict with whole tensors, whatever is split; in the first process, but all ask."""
    state = optimizer.state_dict()
    entries = {}
    for number, entry in state["state"].items():
        tensors = {key: value for key, value in entry.items() if isinstance(value, Tensor)}
        entries[number] = entry | gathered(tensors)
    return state | {"state": entries}


def load_state_json(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint.

    Raises:
        FileFormatError: missing, damaged, or of another format.
    """
    path = folder / STATE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
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
    """Restore optimizer and scheduler, bit for bit; of what is split, this process's shards.

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
    groups, scheduled = content["optimizer_groups"], content["scheduler"]
    if isinstance(scheduler, LambdaLR):
        # As the schedule has it now: over more steps than it was saved with, where it is longer.
        rates = [
            base * factor(scheduled["last_epoch"])
            for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        scheduled["_last_lr"] = rates
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
    for group in groups:
        if "betas" in group:
            group["betas"] = tuple(group["betas"])
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter, entry in ((parameters[n], e) for n, e in state.items() if n < len(parameters)):
        for key, tensor in entry.items():
            if isinstance(tensor, Tensor):
                entry[key] = shard_like(tensor, parameter)
    try:
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    except (ValueError, KeyError) as error:
        raise FileFormatError(
            f"the optimizer state does not fit this run: {error}", where=str(folder)
        ) from error
    scheduler.load_state_dict(scheduled)


def load_random(folder: Path) -> None:
    """Restore this process's python's, numpy's and torch's random state.

    Raises:
        FileFormatError: the files are damaged.
    """
    kept, own = load_state_json(folder)["random"], f"{distributed.rank()}/"
    tensors = {
        name.removeprefix(own): tensor
        for name, tensor in read_tensors(folder / RANDOM).items()
        if name.startswith(own)
    }
    try:
        set_random_state((tensors, kept[distributed.rank()]))
    except (KeyError, IndexError, ValueError, TypeError, RuntimeError) as error:
        raise FileFormatError(
            f"the random state cannot be restored: {error}",
            where=str(folder),
            fix="remove the damaged checkpoint",
        ) from error


def set_random_state(state: RandomState) -> None:
    """Restore what :func:`random_state` returned."""
    tensors, content = state
    version, internal, gauss = content["python"]
    name, position, has_gauss, cached = content["numpy"]
    numpy_keys = tensors["numpy"].numpy().astype(np.uint32)
    torch.set_rng_state(tensors["torch"])
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state((name, numpy_keys, position, has_gauss, cached))
    cuda = [tensors[k] for k in sorted(t for t in tensors if t.startswith("cuda/"))]
    if cuda and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(cuda[: torch.cuda.device_count()])


def random_state() -> RandomState:
    """State of all generators of this process: in tensors, and as JSON."""
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
