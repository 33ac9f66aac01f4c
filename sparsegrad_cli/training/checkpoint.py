"""The tensors and the state of a checkpoint, written and restored bit for bit, without pickle.

checkpoint-N/
  trainable.safetensors   every parameter that trains
  optimizer.safetensors   state tensors, named "<parameter number>/<key>"
  random.safetensors      states of the generators of torch (CPU, CUDA) and numpy, "<process>/<key>"
  state.json              all else: run/checkpoint_state.py
  manifest.json           size and digest of each file: run/checkpoints.py
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from sparsegrad_cli import distributed
from sparsegrad_cli.error_mapping import first_line, is_out_of_memory
from sparsegrad_cli.errors import FileFormatError, SparsegradError
from sparsegrad_cli.io.atomic import read_tensors, write_tensors
from sparsegrad_cli.methods.implementation import Method, load_by_name, trainable_names
from sparsegrad_cli.models.sharded_tensors import gather, shard_like
from sparsegrad_cli.records.run import RunRecord
from sparsegrad_cli.run.checkpoint_state import (
    REMOVE,
    CheckpointState,
    LoopState,
    read_state,
    write_state,
)
from sparsegrad_cli.run.checkpoints import TRAINABLE, damage
from sparsegrad_cli.tasks.setup import Setup

# What a run is made of, in the order checked: another basis follows from other data.
_ORIGINS = {
    "data": ("on other data", "the data"),
    "model": ("on another base model", "the model"),
    "basis": ("in another basis", "basis.safetensors"),
    "start": ("from another adapter", "what init_from names"),
}
OPTIMIZER, RANDOM = "optimizer.safetensors", "random.safetensors"
#: States of a process's generators: tensors, and what JSON holds.
RandomState = tuple[dict[str, Tensor], dict[str, Any]]


def write_checkpoint(
    folder: Path,
    state: LoopState,
    weights: Mapping[str, Tensor],
    optimizer_state: Mapping[str, Any],
    scheduler: Any,
    random_states: Sequence[RandomState],
) -> None:
    """Write all files but the manifest into a folder; not atomic.

    Args:
        folder: Exists.
        state: What the loop knows. The parts of optimizer, scheduler and generators are added.
        weights: Every parameter that trains, whole.
        optimizer_state: Of :func:`whole_state`.
        scheduler: Of the learning rate.
        random_states: Of :func:`random_state`, of every process in order.
    """
    write_tensors({n: t.cpu().contiguous() for n, t in weights.items()}, folder / TRAINABLE)
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    written: set[int] = set()
    for number, entry in optimizer_state["state"].items():
        for key, value in entry.items():
            if isinstance(value, Tensor):
                tensor = value.detach().cpu().contiguous()
                # Parameters may share a table, which safetensors holds once for each of them.
                shared = tensor.data_ptr() in written
                tensors[f"{number}/{key}"] = tensor.clone() if shared else tensor
                written.add(tensor.data_ptr())
            else:
                numbers[f"{number}/{key}"] = value
    write_tensors(tensors, folder / OPTIMIZER)
    generators = {
        f"{process}/{key}": tensor
        for process, (of_one, _) in enumerate(random_states)
        for key, tensor in of_one.items()
    }
    write_tensors(generators, folder / RANDOM)
    complete = CheckpointState(
        **dict(state),
        optimizer_groups=json.loads(json.dumps(optimizer_state["param_groups"])),
        optimizer_numbers=numbers,
        scheduler=_without_functions(scheduler.state_dict()),
        random=[content for _, content in random_states],
    )
    write_state(folder, complete)


def whole_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the optimizer's state_dict with whole tensors.

    bitsandbytes nests tensors in a dict of its own; here they have names such as ``dict/state1``.
    All processes have to call it. Only the first one gets the tensors that are sharded.
    """
    state = optimizer.state_dict()
    entries = {}
    for number, nested in state["state"].items():
        entry = _flat(nested)
        tensors = {key: value for key, value in entry.items() if isinstance(value, Tensor)}
        entries[number] = entry | gather(tensors)
    return state | {"state": entries}


def _flat(entry: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in entry.items():
        inner = value if isinstance(value, dict) else None
        flat |= {key: value} if inner is None else {f"{key}/{k}": v for k, v in inner.items()}
    return flat


def _nested(entry: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in entry.items():
        key, slash, inner = name.partition("/")
        if slash:
            nested.setdefault(key, {})[inner] = value
        else:
            nested[key] = value
    return nested


def _without_functions(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a scheduler's state without what JSON cannot hold, which is rebuilt."""
    plain = {}
    for key, value in state.items():
        try:
            plain[key] = json.loads(json.dumps(value))
        except TypeError:
            continue
    return plain


def origins(setup: Setup, record: RunRecord) -> dict[str, str | None]:
    """Return the digests of the inputs of a run."""
    return {
        "data": setup.task.data_hash,
        "model": setup.fingerprint,
        "basis": record.calibration.digest if record.calibration else None,
        "start": record.init_from.digest if record.init_from else None,
    }


def check_origins(
    folder: Path, then: Mapping[str, str | None], now: Mapping[str, str | None]
) -> None:
    """Refuse a checkpoint of a run that was made of something else.

    Args:
        folder: The checkpoint.
        then, now: Its :func:`origins`, and those of the run.

    Raises:
        FileFormatError: Names what differs.
    """
    for name, digest in then.items():
        words, lost = _ORIGINS.get(name, ("otherwise", name))
        if digest != now.get(name):
            raise FileFormatError(
                f"{folder.name} was trained {words} than the run uses now",
                where=str(folder),
                fix=f"restore {lost} from a copy, or start again with --overwrite",
            )


def load_best_weights(folder: Path, model: nn.Module, method: Method) -> None:
    """Load the weights of the best checkpoint, which was written by this run.

    Raises:
        FileFormatError: It is missing or damaged.
    """
    wrong = damage(folder)
    if wrong is not None:
        raise FileFormatError(
            f"{folder.name}, the best checkpoint, has been damaged since: {wrong}",
            where=str(folder),
            fix="--resume trains again from the checkpoint before",
        )
    load_weights(folder, model, method)


def load_weights(folder: Path, model: nn.Module, method: Method) -> None:
    """Copy a checkpoint's weights into the model's trainable parameters.

    Args:
        folder: The checkpoint.
        model: The model that ``method`` has prepared.
        method: Knows the names that earlier versions gave to parameters.

    Raises:
        FileFormatError: The file is damaged, or holds other parameters.
    """
    read = read_tensors(folder / TRAINABLE)
    tensors = {method.current_name(name): tensor for name, tensor in read.items()}
    other = sorted(set(tensors) ^ trainable_names(model))
    try:
        if other:
            raise KeyError(other[0])
        load_by_name(model, tensors)
    except KeyError as error:
        raise FileFormatError(
            f"the checkpoint does not fit this recipe: {error.args[0]}",
            where=str(folder),
            fix="resume with the recipe that the run was started with (recipe.yaml in its folder)",
        ) from None


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    """Restore optimizer and scheduler; of sharded tensors this process's part.

    The learning rate follows the scheduler as it is now: a run that was extended has more steps.

    Raises:
        FileFormatError: The files are damaged, or belong to another set of parameters.
    """
    content = read_state(folder)
    entries: dict[int, dict[str, Any]] = {}
    for name, tensor in read_tensors(folder / OPTIMIZER).items():
        number, key = name.split("/", 1)
        entries.setdefault(int(number), {})[key] = tensor
    for name, value in content.optimizer_numbers.items():
        number, key = name.split("/", 1)
        entries.setdefault(int(number), {})[key] = value
    groups = [dict(group) for group in content.optimizer_groups]
    schedule = dict(content.scheduler)
    if isinstance(scheduler, LambdaLR):
        rates = [
            base * factor(schedule["last_epoch"])
            for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        schedule["_last_lr"] = rates
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
    for group in groups:
        if "betas" in group:
            group["betas"] = tuple(group["betas"])
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter, entry in ((parameters[n], e) for n, e in entries.items() if n < len(parameters)):
        for key, tensor in entry.items():
            if isinstance(tensor, Tensor):
                entry[key] = shard_like(tensor, parameter)
    try:
        state = {number: _nested(entry) for number, entry in entries.items()}
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    except (ValueError, KeyError) as error:
        raise FileFormatError(
            f"the optimizer state does not fit this run: {error}", where=str(folder), fix=REMOVE
        ) from error
    scheduler.load_state_dict(schedule)


def load_random(folder: Path) -> None:
    """Restore the generators of python, numpy and torch of this process.

    Raises:
        FileFormatError: The files are damaged.
    """
    contents, own = read_state(folder).random, f"{distributed.rank()}/"
    tensors = {
        name.removeprefix(own): tensor
        for name, tensor in read_tensors(folder / RANDOM).items()
        if name.startswith(own)
    }
    try:
        _set_random_state((tensors, contents[distributed.rank()]))
    except (KeyError, IndexError, ValueError, TypeError, RuntimeError) as error:
        raise FileFormatError(
            f"the random state cannot be restored: {error}", where=str(folder), fix=REMOVE
        ) from error


def random_state() -> RandomState:
    """Return the states of all generators of this process."""
    state: Any = np.random.get_state()
    name, keys, position, has_gauss, cached = state
    tensors = {
        "torch": torch.get_rng_state(),
        # safetensors knows uint32, but its older readers do not: int64 holds it exactly.
        "numpy": torch.from_numpy(keys.astype(np.int64)),
    }
    if torch.cuda.is_available():
        states = torch.cuda.get_rng_state_all()
        tensors.update({f"cuda/{number:03d}": state for number, state in enumerate(states)})
    version, internal, gauss = random.getstate()
    numpy_state = [str(name), int(position), int(has_gauss), float(cached)]
    return tensors, {"python": [version, list(internal), gauss], "numpy": numpy_state}


def _set_random_state(state: RandomState) -> None:
    tensors, content = state
    version, internal, gauss = content["python"]
    name, position, has_gauss, cached = content["numpy"]
    numpy_keys = tensors["numpy"].numpy().astype(np.uint32)
    torch.set_rng_state(tensors["torch"])
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state((name, numpy_keys, position, has_gauss, cached))
    cuda = [tensors[key] for key in sorted(tensors) if key.startswith("cuda/")]
    if cuda and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(cuda[: torch.cuda.device_count()])


@contextmanager
def checkpoint_errors(folder: Path | None, resumed: Callable[[], bool]) -> Iterator[None]:
    """Report any error before the first resumed step as a fault of the checkpoint's files.

    Tensors and states may come from another model: they load, and the first step fails.

    Args:
        folder: The checkpoint that training continues from, if any.
        resumed: Says whether the run has taken a step since, or has ended.

    Raises:
        FileFormatError: Names the error.
    """
    try:
        yield
    except SparsegradError:
        raise
    except Exception as error:
        if folder is None or resumed() or is_out_of_memory(error):
            raise
        raise FileFormatError(
            f"the run cannot continue from {folder.name}: {type(error).__name__}: "
            f"{first_line(error)}",
            where=str(folder),
            fix=REMOVE,
        ) from error
