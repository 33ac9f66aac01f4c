"""What a run left, put back onto its base model. Needs none of the run's data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn

from sparsegrad_cli.calibration.basis_file import BasisFile, check_belongs, check_rank, read_basis
from sparsegrad_cli.errors import DownloadError, FileFormatError, UsageError
from sparsegrad_cli.export.run_files import RunFiles
from sparsegrad_cli.io.atomic import read_tensors
from sparsegrad_cli.methods.base import MethodSettings, TargetShapes
from sparsegrad_cli.methods.implementation import Method, load_by_name, trainable_state
from sparsegrad_cli.models.targets import Target
from sparsegrad_cli.numerics.hosvd import Basis
from sparsegrad_cli.numerics.seeding import temporary_seed
from sparsegrad_cli.recipe.load_recipe import LoadedRecipe
from sparsegrad_cli.report.access import dig
from sparsegrad_cli.training.adapter_folder import read_adapter


class Base(Protocol):
    """A model as its files have it, and what is adapted in it; a ``Setup`` is one."""

    model: nn.Module
    targets: list[Target]
    fingerprint: str


class Restored(NamedTuple):
    """What put a run's adapter onto its base; see ``Trained``."""

    method: Method
    settings: MethodSettings
    tensors: dict[str, Tensor]
    basis: BasisFile | None


def restore(files: RunFiles, base: Base) -> Restored:
    """Prepare a base model as the run did and load what it left. It needs none of the run's data.

    Args:
        base: of the run, see :func:`check_base`; its model is changed, and set to eval mode.

    Raises:
        FileFormatError: a file of the run is damaged.
    """
    settings: MethodSettings = files.loaded.recipe.method
    basis = None
    if settings.calibrates:
        settings, basis = _settled(files, base, settings)
    method = settings.implementation()
    with temporary_seed(files.loaded.recipe.seed):
        method.prepare(
            base.model,
            base.targets,
            scope=files.loaded.recipe.scope,
            bases=basis.by_target() if basis else None,
            scores=basis.scores if basis else None,
        )
    tensors = _load(files, base, method)
    base.model.eval()
    return Restored(method, settings, tensors, basis)


def _settled(
    files: RunFiles, base: Base, settings: MethodSettings
) -> tuple[MethodSettings, BasisFile]:
    """The settings with a core's rank as the run used it, and the basis."""
    settings = settings.settle(TargetShapes.of(files.loaded, base.targets))
    basis = _basis(files, base, settings)
    if isinstance(settings.basis_rank, float) and files.owns_basis:
        # It was cut to that share when it was written: all that is left of it was used.
        settings = settings.with_basis_rank(widest(basis.bases.values()))
    return settings, basis


def widest(bases: Iterable[Basis]) -> int:
    """The most directions that any of them holds of a side."""
    return max(q.shape[1] for basis in bases for q in (basis.q_out, basis.q_in))


@contextmanager
def blaming_base(loaded: LoadedRecipe) -> Iterator[None]:
    """While the base model is loaded: where it cannot be, say that it may lie elsewhere now."""
    try:
        yield
    except (DownloadError, FileFormatError) as error:
        if error.where != "model.name":
            raise
        raise type(error)(
            f"the base model of this run cannot be loaded: {error.what}",
            where=loaded.where("model.name"),
            fix="put it back, or say where it is now: model.name=FOLDER",
        ) from error


def check_base(files: RunFiles, base: Base) -> None:
    """Refuse a base with other targets than the run's, or with other weights in them.

    Raises:
        UsageError: says how to name the right one.
    """
    names = [target.name for target in base.targets]
    recorded = files.recorded("model", "fingerprint")
    if files.target_names != names or recorded != base.fingerprint:
        raise UsageError(
            f"the base model has changed: {files.loaded.recipe.model.name} does not hold the "
            "weights that this run started from",
            where=files.loaded.where("model.name"),
            fix="put the original back, or say where it is now: model.name=FOLDER",
        )


def _basis(files: RunFiles, base: Base, settings: MethodSettings) -> BasisFile:
    """The basis the run was trained with, on the base of the run."""
    where = files.basis[1]
    basis = read_basis_of(files)
    check_belongs(basis, base.targets, base.fingerprint, where)
    if not isinstance(settings.basis_rank, float):
        check_rank(basis, settings.basis_rank, where)
    return basis


def read_basis_of(files: RunFiles) -> BasisFile:
    """Read the basis that a run was trained with, and no other.

    Raises:
        FileFormatError: it is damaged, or another one.
    """
    path, where = files.basis
    basis = read_basis(path)
    if basis.digest != files.recorded("calibration", "digest"):
        raise FileFormatError(
            "the basis is not the one that this run was trained with: it was made anew since",
            where=where,
            fix="bring it back from a copy, or say where it is now: calibration.basis=FILE",
        )
    return basis


def _load(files: RunFiles, base: Base, method: Method) -> dict[str, Tensor]:
    """Put what the run left onto the prepared model; returns it as an adapter."""
    where = str(files.tensors)
    if files.from_adapter:
        fresh = dig(files.record, "model", "head", "fresh")
        names = [name for name in fresh if isinstance(name, str)] if isinstance(fresh, list) else []
        tensors = read_adapter(files.tensors, base.model, names)
        with safe_open(files.tensors, framework="pt") as file:
            digest = (file.metadata() or {}).get("recipe_digest")
        if digest != files.record.get("recipe_digest"):
            raise _unfit("it was left by another run", where)
        load_checked(method, base.model, tensors, where)
        return tensors
    tensors = read_tensors(files.tensors)
    state = trainable_state(base.model)
    check_alike(tensors, state, where)
    load_by_name(base.model, tensors)
    return method.adapter_tensors(base.model)


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
        if tensor.dtype != like.dtype and not (
            tensor.is_floating_point() and like.is_floating_point()
        ):
            raise _unfit(f"{name} holds {tensor.dtype} instead of {like.dtype}", where)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise _unfit(f"{name} holds values that are not finite", where)


def _unfit(reason: str, where: str) -> FileFormatError:
    return FileFormatError(
        f"what was trained does not fit its model: {reason}",
        where=where,
        fix="bring the file back from a copy, or train again",
    )
