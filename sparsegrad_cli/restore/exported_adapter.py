"""Load the adapter that ``sparsegrad export --to adapter`` writes (export/adapter.py).

adapter.safetensors   trained parameters, by the method's own names;
                      ``basis/<part>/<key>``: the bases, truncated to what the method uses;
                      ``fresh/<name>``: parameters that were not trained and that the files of the
                      base model lack
adapter.json          :class:`AdapterSettings`, which checks every value, since the file may come
                      from anyone
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ValidationError
from torch import Tensor, nn

from sparsegrad_cli.calibration.basis_file import check_directions
from sparsegrad_cli.errors import FileFormatError, UsageError
from sparsegrad_cli.io.atomic import read_tensors
from sparsegrad_cli.methods.registry import MethodSection
from sparsegrad_cli.methods.sparse_method import check_positions
from sparsegrad_cli.models.digests import fingerprint, tensors_digest
from sparsegrad_cli.models.load_model import load_by_auto_class
from sparsegrad_cli.models.quantized import move_model, use_frozen_forward
from sparsegrad_cli.models.targets import Target, is_linear, linear_shape
from sparsegrad_cli.numerics.hosvd import Basis, by_columns
from sparsegrad_cli.numerics.seeding import temporary_seed
from sparsegrad_cli.recipe.schema import ModelSection
from sparsegrad_cli.recipe.section import NonNegativeInt, PositiveInt, Section, Seed
from sparsegrad_cli.restore.restore import THRESHOLD, load_checked

FORMAT: Literal["sparsegrad-adapter-1"] = "sparsegrad-adapter-1"
TENSORS, SETTINGS = "adapter.safetensors", "adapter.json"
BASIS, FRESH = "basis/", "fresh/"
PARTS = ("q_out", "q_in", "singular_out", "singular_in")
# Errors that tensors and settings can raise if they do not fit together.
_INCONSISTENT = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class AdapterTarget(Section):
    """A :class:`sparsegrad_cli.models.targets.Target`."""

    name: str = Field(min_length=1)
    kind: str
    block: NonNegativeInt
    out_features: PositiveInt
    in_features: PositiveInt
    transposed: bool

    def target(self) -> Target:
        """Return the target module."""
        return Target(**self.model_dump())


class AdapterBase(Section):
    """The base model, and the settings that the task added to its configuration."""

    name: str = Field(min_length=1)
    revision: str | None
    dtype: Literal["float32", "bfloat16", "float16"]
    quantization: Literal["8bit", "4bit"] | None = None
    auto_class: Literal["AutoModelForSequenceClassification", "AutoModelForCausalLM"]
    fingerprint: str
    num_labels: PositiveInt
    id2label: dict[str, str]
    problem_type: str | None
    pad_token_id: NonNegativeInt | None
    label_threshold: Annotated[float, Field(ge=0, le=1)] | None = None


class AdapterSettings(Section):
    """The content of adapter.json."""

    format: Literal["sparsegrad-adapter-1"]
    model: AdapterBase
    method: MethodSection
    scope: Literal["head", "pooler", "rest"]
    seed: Seed
    targets: tuple[AdapterTarget, ...] = Field(min_length=1)
    keys: dict[str, str] = Field(description="target name -> key of its basis")
    digest: str = Field(description="sha256 of the tensors")


def load_adapter(
    folder: str | Path,
    model: nn.Module | None = None,
    *,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> nn.Module:
    """Load an export of ``sparsegrad export --to adapter``, in the form that it was trained in.

    Args:
        folder: The exported folder.
        model: The plain base model, which is changed in place. By default the model that the
            adapter names is loaded.
        device: Where to load the base model. A quantized model cannot be moved later.
        trust_remote_code: Run code that comes with the base model, if that is loaded here.

    Returns:
        The model in eval mode. The parameters that the method trains require gradients, so that
        training can continue.

    Raises:
        FileFormatError: The adapter is damaged or inconsistent.
        UsageError: The model is not the one that the adapter was trained on.
        DownloadError: The base model must be downloaded and cannot be.
    """
    folder = Path(folder)
    settings = read_settings(folder)
    where = str(folder / TENSORS)
    tensors = read_tensors(folder / TENSORS)
    if tensors_digest(sorted(tensors.items())) != settings.digest:
        raise FileFormatError("the digest of the tensors differs from adapter.json", where=where)
    if model is None:
        model = _load_base(settings.model, torch.device(device), trust=trust_remote_code)
    targets = [target.target() for target in settings.targets]
    use_frozen_forward(model, getattr(torch, settings.model.dtype))
    _check_base(model, targets, settings.model, str(folder))
    method = settings.method.implementation()
    try:
        bases = _bases(tensors, settings.keys, targets)
        with torch.no_grad():
            for name, tensor in tensors.items():
                if name.startswith(FRESH):
                    model.get_parameter(name.removeprefix(FRESH)).copy_(tensor)
        tensors = {n: t for n, t in tensors.items() if not n.startswith((BASIS, FRESH))}
        scores = _scores(tensors, bases, targets)
        with temporary_seed(settings.seed):
            method.prepare(
                model, targets, scope=settings.scope, bases=bases or None, scores=scores or None
            )
    except _INCONSISTENT as error:
        fix = "restore the folder from a copy, or export the run again"
        raise FileFormatError(f"is inconsistent: {error}", where=where, fix=fix) from error
    load_checked(method, model, tensors, where)
    return model.eval()


def _load_base(base: AdapterBase, device: torch.device, *, trust: bool) -> nn.Module:
    section = ModelSection(
        name=base.name,
        revision=base.revision,
        dtype=base.dtype,
        quantization=base.quantization,
        trust_remote_code=trust,
    )
    names = {int(number): name for number, name in base.id2label.items()}
    config: dict[str, Any] = {
        "num_labels": base.num_labels,
        "id2label": names,
        "label2id": {name: number for number, name in names.items()},
        "problem_type": base.problem_type,
        "pad_token_id": base.pad_token_id,
    }
    if base.label_threshold is not None:
        config[THRESHOLD] = base.label_threshold
    with temporary_seed(0):
        return move_model(load_by_auto_class(base.auto_class, section, config, device), device)


def _check_base(model: nn.Module, targets: list[Target], base: AdapterBase, where: str) -> None:
    """Refuse a model without the target modules, or with other weights in them."""
    for target in targets:
        try:
            layer = model.get_submodule(target.name)
        except AttributeError:
            layer = None
        if layer is None or not is_linear(layer):
            raise UsageError(
                f"the model has no plain linear layer {target.name}: it is not the base model of "
                "this adapter, or has an adapter already",
                where=where,
            )
        shape = (target.out_features, target.in_features)
        if linear_shape(layer) != shape:
            raise UsageError(
                f"expected a layer of {shape[0]} x {shape[1]}, got "
                f"{' x '.join(map(str, linear_shape(layer)))}: {target.name}",
                where=where,
            )
    labels = getattr(model.config, "num_labels", base.num_labels)
    if base.auto_class == "AutoModelForSequenceClassification" and labels != base.num_labels:
        raise UsageError(
            f"expected a model with {base.num_labels} labels, got {labels}",
            where=where,
            fix=f"load it with num_labels={base.num_labels}",
        )
    if fingerprint(model, targets) != base.fingerprint:
        bits = f", quantized to {base.quantization}" if base.quantization else ""
        raise UsageError(
            f"the adapter was trained on other weights: {base.name} in {base.dtype}{bits}",
            where=where,
            fix="load that model in that dtype" + (", quantized that way" if bits else ""),
        )


def _bases(
    tensors: Mapping[str, Tensor], keys: Mapping[str, str], targets: list[Target]
) -> dict[str, Basis]:
    """Return target name -> basis; targets with the same key share one object.

    Raises:
        KeyError, ValueError: A basis is missing or does not fit its target.
    """
    made: dict[str, Basis] = {}
    for target in targets if keys else ():
        key = keys[target.name]
        parts = [tensors[f"{BASIS}{part}/{key}"] for part in PARTS]
        sides = (target.out_features, target.in_features)
        for side, q, singular in zip(sides, parts[:2], parts[2:], strict=True):
            if q.ndim != 2 or q.shape[0] != side or not 1 <= q.shape[1] <= side:
                raise ValueError(f"the basis of {target.name} has shape {tuple(q.shape)}")
            if not bool(torch.isfinite(q).all()):
                raise ValueError(f"the basis of {target.name} holds values that are not finite")
            check_directions(f"the basis of {target.name}", q, singular)
        if key not in made:
            made[key] = Basis(by_columns(parts[0]), by_columns(parts[1]), parts[2], parts[3])
    return {target.name: made[keys[target.name]] for target in targets if keys}


def _scores(
    tensors: Mapping[str, Tensor], bases: Mapping[str, Basis], targets: list[Target]
) -> dict[str, Tensor]:
    """Return scores that select the stored positions again: 1 at each of them, 0 elsewhere.

    Raises:
        ValueError: A position lies outside the core.
    """
    scores = {}
    for target in targets:
        positions = tensors.get(f"{target.name}.support")
        if positions is None:
            continue
        basis = bases[target.name]
        score = torch.zeros(basis.q_out.shape[1], basis.q_in.shape[1])
        check_positions(target.name, positions, positions, score.numel())
        score.view(-1)[positions.long()] = 1.0
        scores[target.name] = score
    return scores


def read_settings(folder: Path) -> AdapterSettings:
    """Read and check adapter.json.

    Raises:
        FileFormatError: It is missing, not JSON, of another version, or has a wrong value.
    """
    path = folder / SETTINGS
    fix = "export the run again with `sparsegrad export RUN --to adapter`"
    try:
        return AdapterSettings.model_validate_json(path.read_bytes())
    except OSError as error:
        raise FileFormatError(
            f"cannot read the adapter: {error.strerror or error}", where=str(path), fix=fix
        ) from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        raise FileFormatError(
            f"is not an adapter.json of this version: {key}: {first['msg']}",
            where=str(path),
            fix=fix,
        ) from error
