"""A run's model again, in the form it was trained in: recipe -> model -> method -> adapter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from sparsegrad_cli.errors import DownloadError, FileFormatError, UsageError
from sparsegrad_cli.export.run_files import RunFiles
from sparsegrad_cli.methods.base import Method, load_by_name, trainable_state
from sparsegrad_cli.methods.core_plan import with_rank
from sparsegrad_cli.methods.table import make_method
from sparsegrad_cli.modeling.quantized import dtype_of
from sparsegrad_cli.numerics.hosvd import Basis, truncated
from sparsegrad_cli.observer import Observer
from sparsegrad_cli.recipe.loading import LoadedRecipe
from sparsegrad_cli.recipe.method_section import MethodSection, SparsegradMethod
from sparsegrad_cli.recipe.schema import Recipe
from sparsegrad_cli.report.access import dig
from sparsegrad_cli.training.basis_file import BasisFile, check_belongs, check_rank, read_basis
from sparsegrad_cli.training.calibration import basis_keys
from sparsegrad_cli.training.checkpoint import read_tensors
from sparsegrad_cli.training.gradients import forked_random
from sparsegrad_cli.training.setup import Setup, make_setup

# Rows of the training data that are read: what a task is (its labels) is known from the whole file.
_TRAIN_ROWS = 32


@dataclass
class Trained:
    """A run's model with its adapter on.

    Attributes:
        recipe: of the run.
        setup: ``setup.model`` is the model in the form it was trained in, in eval mode.
        method: that prepared it.
        settings: the method's, with a core's rank settled.
        finished: training came to its end; else this is a checkpoint.
        tensors: the adapter, as :meth:`Method.load_adapter` takes it.
        bases: key -> basis, as the method uses it; empty for methods without.
        keys: target name -> key.
    """

    recipe: Recipe
    setup: Setup
    method: Method
    settings: Any
    finished: bool
    tensors: dict[str, Tensor]
    bases: dict[str, Basis] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)


def rebuild(files: RunFiles, examples: int) -> Trained:
    """Load the base model and the first validation rows, prepare as the run did, load what it left.

    Args:
        examples: validation rows to read.

    Raises:
        UsageError: the base model is another than the run's.
        DownloadError, FileFormatError: it is gone, or a file of the run is damaged.
    """
    setup = _setup(files, examples)
    settings: MethodSection = files.loaded.recipe.method
    basis = None
    if isinstance(settings, SparsegradMethod):
        settings, basis = _settled(files, setup, settings)
    method = make_method(settings)
    with forked_random(files.loaded.recipe.seed):
        method.prepare(
            setup.model,
            setup.targets,
            scope=files.loaded.recipe.scope,
            bases=basis.by_target() if basis else None,
            scores=basis.scores if basis else None,
        )
    tensors = _load(files, setup, method)
    setup.model.eval()
    trained = Trained(files.loaded.recipe, setup, method, settings, files.from_adapter, tensors)
    if basis is not None:
        trained.bases, trained.keys = _cut(basis, trained), dict(basis.keys)
    return trained


def _settled(
    files: RunFiles, setup: Setup, settings: SparsegradMethod
) -> tuple[SparsegradMethod, BasisFile]:
    """The settings with a core's rank as the run used it, and the basis."""
    keys = basis_keys(setup.targets, files.loaded.recipe.calibration.basis_per)
    settings = with_rank(settings, setup.targets, keys, files.loaded.where("method.rank"))
    basis = _basis(files, setup, settings)
    if isinstance(settings.rank, float) and files.owns_basis:
        # It was cut to that share when it was written: all that is left of it was used.
        settings = settings.model_copy(update={"rank": widest(basis.bases.values())})
    return settings, basis


def _cut(basis: BasisFile, trained: Trained) -> dict[str, Basis]:
    """Key -> the directions that the method uses, in the weights' dtype, in which it uses them."""
    settings = trained.settings
    rank = settings.rank if settings.form == "core" else None
    dtype = dtype_of(trained.setup.model.get_submodule(trained.setup.targets[0].name))
    made = {}
    for key, one in basis.bases.items():
        cut = truncated(one, rank)
        sides = (cut.q_out.to(dtype), cut.q_in.to(dtype))
        made[key] = Basis(*sides, cut.singular_out, cut.singular_in)
    return made


def widest(bases: Iterable[Basis]) -> int:
    """The most directions that any of them holds of a side."""
    return max(q.shape[1] for basis in bases for q in (basis.q_out, basis.q_in))


def _setup(files: RunFiles, examples: int) -> Setup:
    """Model, tokenizer, targets and a few rows; refused where they are not those of the run."""
    loaded = files.loaded
    try:
        setup = make_setup(_with_few_rows(loaded, examples), Observer())
    except (DownloadError, FileFormatError) as error:
        if error.where != "model.name":
            raise
        raise type(error)(
            f"the base model of this run cannot be loaded: {error.what}",
            where=loaded.where("model.name"),
            fix="put it back, or say where it is now: model.name=FOLDER",
        ) from error
    recorded = files.recorded("model", "fingerprint")
    targets = files.target_names
    if targets != [target.name for target in setup.targets] or recorded != setup.fingerprint:
        raise UsageError(
            f"the base model has changed: {loaded.recipe.model.name} does not hold the weights "
            "that this run started from",
            where=loaded.where("model.name"),
            fix="put the original back, or say where it is now: model.name=FOLDER",
        )
    labels, names = dig(files.record, "task", "label_names"), setup.task.label_names or ()
    if isinstance(labels, list) and list(names) != labels:
        raise UsageError(
            "the data has other labels than this run was trained on: "
            f"{', '.join(names)} instead of {', '.join(map(str, labels))}",
            where=loaded.where("task"),
            fix="put the original data back, or say where it is now: task.path=PATH",
        )
    return setup


def _with_few_rows(loaded: LoadedRecipe, examples: int) -> LoadedRecipe:
    task = loaded.recipe.task
    limits = {
        "train_limit": min(_TRAIN_ROWS, task.train_limit or _TRAIN_ROWS),
        "eval_limit": min(examples, task.eval_limit or examples),
    }
    few = loaded.recipe.model_copy(update={"task": task.model_copy(update=limits)})
    return LoadedRecipe(few, loaded.source, loaded.places)


def _basis(files: RunFiles, setup: Setup, settings: SparsegradMethod) -> BasisFile:
    """The basis the run was trained with, and no other."""
    path, where = files.basis
    basis = read_basis(path)
    check_belongs(basis, setup.targets, setup.fingerprint, where)
    rank = settings.rank if settings.form == "core" else None
    if not isinstance(rank, float | str):
        check_rank(basis, rank, where)
    if basis.digest != files.recorded("calibration", "digest"):
        raise FileFormatError(
            "the basis is not the one that this run was trained with: it was made anew since",
            where=where,
            fix="bring it back from a copy, or say where it is now: calibration.basis=FILE",
        )
    return basis


def _load(files: RunFiles, setup: Setup, method: Method) -> dict[str, Tensor]:
    """Put what the run left onto the prepared model; returns it as an adapter."""
    tensors = read_tensors(files.tensors)
    where = str(files.tensors)
    if files.from_adapter:
        with safe_open(files.tensors, framework="pt") as file:
            digest = (file.metadata() or {}).get("recipe_digest")
        if digest != files.record.get("recipe_digest"):
            raise _unfit("it was left by another run", where)
        load_checked(method, setup.model, tensors, where)
        return tensors
    state = trainable_state(setup.model)
    check_alike(tensors, state, where)
    load_by_name(setup.model, tensors)
    return method.adapter_tensors(setup.model)


def load_checked(method: Method, model: Any, tensors: Mapping[str, Tensor], where: str) -> None:
    """:meth:`Method.load_adapter`, after a look at every tensor.

    Raises:
        FileFormatError: names, shapes, dtypes or positions do not fit, or a value is not finite.
    """
    check_alike(tensors, method.adapter_tensors(model), where)
    try:
        method.load_adapter(model, tensors)
    except KeyError as error:
        raise _unfit(f"{error.args[0]} has another shape", where) from error
    except ValueError as error:
        raise _unfit(str(error), where) from error


def check_alike(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> None:
    """Refuse tensors that are not of the names, dimensions and dtypes expected, or not finite.

    Raises:
        FileFormatError: says which.
    """
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected)
    if missing or extra:
        parts = [f"{missing[0]} is missing"] if missing else []
        parts += [f"{extra[0]} does not belong"] if extra else []
        more = len(missing) + len(extra) - len(parts)
        raise _unfit("; ".join(parts) + (f"; {more} more" if more else ""), where)
    for name, tensor in tensors.items():
        like = expected[name]
        listed = name.startswith(("positions/", "values/"))  # as long as training made them
        if tensor.ndim != like.ndim or (tensor.shape != like.shape and not listed):
            shapes = f"{tuple(tensor.shape)} instead of {tuple(like.shape)}"
            raise _unfit(f"{name} has shape {shapes}", where)
        if tensor.dtype != like.dtype:
            raise _unfit(f"{name} holds {tensor.dtype} instead of {like.dtype}", where)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise _unfit(f"{name} holds values that are not finite", where)


def _unfit(reason: str, where: str) -> FileFormatError:
    return FileFormatError(
        f"what was trained does not fit its model: {reason}",
        where=where,
        fix="bring the file back from a copy, or train again",
    )
