"""Rebuild the model of a run: load the base model, prepare it as the run did, load the adapter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from sparsegrad_cli.calibration.basis_file import BasisFile, check_belongs, check_rank, read_basis
from sparsegrad_cli.errors import DownloadError, FileFormatError, UsageError
from sparsegrad_cli.io.atomic import read_tensors
from sparsegrad_cli.methods.base import MethodSettings, TargetShapes
from sparsegrad_cli.methods.implementation import Method, load_by_name, trainable_state
from sparsegrad_cli.models.precision import autocast_to_use
from sparsegrad_cli.models.quantized import dtype_of
from sparsegrad_cli.models.targets import Target
from sparsegrad_cli.numerics.hosvd import Basis, truncated
from sparsegrad_cli.numerics.seeding import temporary_seed
from sparsegrad_cli.progress import Observer
from sparsegrad_cli.recipe.load_recipe import LoadedRecipe
from sparsegrad_cli.recipe.schema import Recipe
from sparsegrad_cli.restore.adapter_folder import read_adapter
from sparsegrad_cli.restore.run_files import RunFiles
from sparsegrad_cli.tasks.setup import Setup, make_setup
from sparsegrad_cli.tasks.task import RowLimits

# Key of a model's configuration: the probability from which one of several labels is given.
THRESHOLD = "label_threshold"
# Number of rows of the training data to load. The labels of a task come from the whole file.
_TRAIN_ROWS = 32


class BaseModule(NamedTuple):
    """A base model, its target modules and their fingerprint, before a method has changed it."""

    model: nn.Module
    targets: list[Target]
    fingerprint: str


class Restored(NamedTuple):
    """The parts of a restored adapter; see :class:`TrainedModel`."""

    method: Method
    settings: MethodSettings
    tensors: dict[str, Tensor]
    basis: BasisFile | None


@dataclass
class TrainedModel:
    """A run's model with its adapter.

    Attributes:
        recipe: The run's recipe.
        setup: Task and model; ``setup.model`` has the form that it was trained in, in eval mode.
        method: The method that prepared it.
        settings: The settings of the method, with the rank that the run used.
        finished: Whether training finished; otherwise the adapter comes from a checkpoint.
        tensors: The adapter, as :meth:`Method.load_adapter` expects it.
        bases: Key -> basis as the method uses it; empty for methods without bases.
        keys: Target name -> key of its basis.
    """

    recipe: Recipe
    setup: Setup
    method: Method
    settings: MethodSettings
    finished: bool
    tensors: dict[str, Tensor]
    bases: dict[str, Basis] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype of autocast if the model mixes float32 and half precision, else None."""
        return autocast_to_use(self.recipe)


def load_trained(files: RunFiles, examples: int) -> TrainedModel:
    """Load the base model and the first validation rows, and restore the adapter.

    Args:
        files: The run.
        examples: The number of validation rows to load.

    Raises:
        UsageError: The base model or the labels of the data differ from the run's.
        DownloadError, FileFormatError: The base model is missing, or a file of the run is damaged.
    """
    with base_model_errors(files.loaded):
        setup = make_setup(files.loaded, Observer(), RowLimits(_TRAIN_ROWS, examples))
    base = BaseModule(setup.model, setup.targets, setup.fingerprint)
    check_base(files, base)
    _check_labels(files, setup)
    method, settings, tensors, basis = restore(files, base)
    recipe = files.loaded.recipe
    if files.threshold is not None:
        setattr(base.model.config, THRESHOLD, files.threshold)  # Exports keep it.
    trained = TrainedModel(recipe, setup, method, settings, files.from_adapter, tensors)
    if basis is not None:
        trained.bases, trained.keys = _bases_in_use(basis, trained), dict(basis.metadata.targets)
    return trained


def restore(files: RunFiles, base: BaseModule) -> Restored:
    """Prepare a base model as the run did and load its adapter. The run's data is not needed.

    Args:
        files: The run.
        base: Its base model, see :func:`check_base`; changed in place and set to eval mode.

    Raises:
        FileFormatError: A file of the run is damaged.
    """
    settings: MethodSettings = files.loaded.recipe.method
    basis = None
    if settings.calibrates:
        settings, basis = _with_basis(files, base, settings)
    method = settings.implementation()
    with temporary_seed(files.loaded.recipe.seed):
        method.prepare(
            base.model,
            base.targets,
            scope=files.loaded.recipe.scope,
            bases=basis.by_target() if basis else None,
            scores=basis.scores if basis else None,
        )
    tensors = _load_adapter(files, base, method)
    base.model.eval()
    return Restored(method, settings, tensors, basis)


@contextmanager
def base_model_errors(loaded: LoadedRecipe) -> Iterator[None]:
    """Make errors about the base model explain how to give its new location."""
    try:
        yield
    except (DownloadError, FileFormatError) as error:
        if error.where != "model.name":
            raise
        raise type(error)(
            f"the base model of this run cannot be loaded: {error.what}",
            where=loaded.where("model.name"),
            fix="put it back, or name its new place: model.name=FOLDER",
        ) from error


def check_base(files: RunFiles, base: BaseModule) -> None:
    """Check that a model is the base model of a run.

    Raises:
        UsageError: Its target modules, or the weights in them, differ from the run's.
    """
    names = [target.name for target in base.targets]
    if files.target_names != names or files.fingerprint != base.fingerprint:
        raise UsageError(
            f"the base model has changed: {files.loaded.recipe.model.name} does not hold the "
            "weights that this run started from",
            where=files.loaded.where("model.name"),
            fix="put the original back, or name its new place: model.name=FOLDER",
        )


def widest(bases: Iterable[Basis]) -> int:
    """Return the largest number of directions that any basis has on either side."""
    return max(q.shape[1] for basis in bases for q in (basis.q_out, basis.q_in))


def read_basis_of(files: RunFiles) -> BasisFile:
    """Read the basis that a run was trained with.

    Raises:
        FileFormatError: The file is damaged or holds another basis.
    """
    path, where = files.basis
    basis = read_basis(path)
    if basis.metadata.digest != files.basis_digest:
        raise FileFormatError(
            "the basis is not the one that this run was trained with: it was computed again since",
            where=where,
            fix="restore it from a copy, or name its new place: calibration.basis=FILE",
        )
    return basis


def load_checked(
    method: Method, model: nn.Module, tensors: Mapping[str, Tensor], where: str
) -> None:
    """Call :meth:`Method.load_adapter` after checking every tensor.

    Raises:
        FileFormatError: Names, shapes, dtypes or positions do not fit, or a value is not finite.
    """
    _check_tensors(tensors, method.adapter_tensors(model), where)
    try:
        method.load_adapter(model, tensors)
    except KeyError as error:
        raise _misfit(f"{error.args[0]} has another shape", where) from error
    except ValueError as error:
        raise _misfit(str(error), where) from error


def _check_labels(files: RunFiles, setup: Setup) -> None:
    recorded = files.record.task.label_names if files.record.task else None
    names = setup.task.label_names or ()
    if recorded is not None and list(names) != recorded:
        raise UsageError(
            f"expected the labels of this run, {', '.join(recorded)}; the data has "
            f"{', '.join(names)}",
            where=files.loaded.where("task"),
            fix="put the original data back, or name its new place: task.path=PATH",
        )


def _with_basis(
    files: RunFiles, base: BaseModule, settings: MethodSettings
) -> tuple[MethodSettings, BasisFile]:
    """Return the settings with the rank that the run used, and its basis."""
    settings = settings.settle(TargetShapes.of(files.loaded, base.targets))
    where = files.basis[1]
    basis = read_basis_of(files)
    check_belongs(basis, base.targets, base.fingerprint, where)
    if not isinstance(settings.basis_rank, float):
        check_rank(basis, settings.basis_rank, where)
    elif files.owns_basis:
        # The basis was cut to that share of the energy when it was written.
        settings = settings.with_basis_rank(widest(basis.bases.values()))
    return settings, basis


def _bases_in_use(basis: BasisFile, trained: TrainedModel) -> dict[str, Basis]:
    """Return, by key, the directions that the method uses, in the dtype of the weights."""
    rank = trained.settings.basis_rank
    dtype = dtype_of(trained.setup.model.get_submodule(trained.setup.targets[0].name))
    in_use = {}
    for key, one in basis.bases.items():
        cut = truncated(one, rank)
        sides = (cut.q_out.to(dtype), cut.q_in.to(dtype))
        in_use[key] = Basis(*sides, cut.singular_out, cut.singular_in)
    return in_use


def _load_adapter(files: RunFiles, base: BaseModule, method: Method) -> dict[str, Tensor]:
    """Load the run's adapter or checkpoint into the prepared model; return it as an adapter."""
    where = str(files.tensors)
    if not files.from_adapter:
        read = read_tensors(files.tensors)
        tensors = {method.current_name(name): tensor for name, tensor in read.items()}
        _check_tensors(tensors, trainable_state(base.model), where)
        load_by_name(base.model, tensors)
        return method.adapter_tensors(base.model)
    head = files.model.head
    tensors = read_adapter(files.tensors, base.model, head.fresh if head else [])
    with safe_open(files.tensors, framework="pt") as file:
        digest = (file.metadata() or {}).get("recipe_digest")
    if digest != files.record.recipe_digest:
        raise _misfit("it belongs to another run", where)
    load_checked(method, base.model, tensors, where)
    return tensors


def _check_tensors(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str
) -> None:
    """Check names, dimensions, dtypes and finiteness.

    Raises:
        FileFormatError: A tensor does not fit. The error names the first one.
    """
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected)
    if missing or extra:
        parts = [f"{missing[0]} is missing"] if missing else []
        parts += [f"{extra[0]} does not belong"] if extra else []
        more = len(missing) + len(extra) - len(parts)
        raise _misfit("; ".join(parts) + (f"; {more} more" if more else ""), where)
    for name, tensor in tensors.items():
        like = expected[name]
        listed = name.startswith(("positions/", "values/"))  # Their length depends on training.
        if tensor.ndim != like.ndim or (tensor.shape != like.shape and not listed):
            shapes = f"expected {tuple(like.shape)}, got {tuple(tensor.shape)}"
            raise _misfit(f"shape of {name}: {shapes}", where)
        both_float = tensor.is_floating_point() and like.is_floating_point()
        if tensor.dtype != like.dtype and not both_float:
            raise _misfit(f"dtype of {name}: expected {like.dtype}, got {tensor.dtype}", where)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise _misfit(f"{name} holds values that are not finite", where)


def _misfit(reason: str, where: str) -> FileFormatError:
    return FileFormatError(
        f"the trained parameters do not fit the model: {reason}",
        where=where,
        fix="restore the file from a copy, or train again",
    )
