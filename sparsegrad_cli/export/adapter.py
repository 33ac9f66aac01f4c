"""Write and load the adapter form: values, positions and bases for the base model.

adapter.safetensors   trained parameters, by the method's own names;
                      ``basis/<part>/<key>``: the bases, truncated to what the method uses;
                      ``fresh/<name>``: parameters that were not trained and that the files of the
                      base model lack
adapter.json          :class:`sparsegrad_cli.export.adapter_file.AdapterSettings`
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad_cli.calibration.basis_file import check_directions
from sparsegrad_cli.errors import FileFormatError, UsageError
from sparsegrad_cli.export.adapter_file import (
    FORMAT,
    TENSORS,
    AdapterBase,
    AdapterSettings,
    AdapterTarget,
    read_settings,
    tensors_digest,
    write_settings,
)
from sparsegrad_cli.export.base_model import (
    CLASSIFIER,
    auto_class,
    changed_parameters,
    put,
    task_settings,
)
from sparsegrad_cli.io.atomic import read_tensors, save_tensors
from sparsegrad_cli.methods.sparse_method import check_positions
from sparsegrad_cli.models.load_model import load_by_auto_class
from sparsegrad_cli.models.pretrained import base_name
from sparsegrad_cli.models.quantized import move_model, use_frozen_forward
from sparsegrad_cli.models.targets import Target, fingerprint, is_linear, linear_shape
from sparsegrad_cli.numerics.hosvd import Basis, by_columns
from sparsegrad_cli.numerics.seeding import temporary_seed
from sparsegrad_cli.recipe.schema import ModelSection
from sparsegrad_cli.restore.restore import TrainedModel, load_checked, widest

_BASIS, _FRESH = "basis/", "fresh/"
# Errors that tensors and settings can raise if they do not fit together.
_INCONSISTENT = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_PARTS = ("q_out", "q_in", "singular_out", "singular_in")


def write_adapter(trained: TrainedModel, plain: nn.Module, folder: Path) -> dict[str, Any]:
    """Write adapter.safetensors and adapter.json.

    Args:
        trained: The run.
        plain: Its base model, see :func:`sparsegrad_cli.export.base_model.plain_model`.
        folder: An existing folder.

    Returns:
        ``fresh`` and ``bases_bytes`` of export.json.

    Raises:
        UsageError: The run has not finished. Only finished runs record what they changed.
    """
    if not trained.finished and any(n.startswith("positions/") for n in trained.tensors):
        raise UsageError(
            "the parameters that this run changed are known only when it has finished",
            where="--to adapter",
            fix="continue it with --resume, or use --to merged",
        )
    tensors = dict(trained.tensors)
    changed = changed_parameters(plain, trained)
    fresh = {name: tensor for name, tensor in changed.items() if not tensor.requires_grad}
    tensors |= {_FRESH + name: tensor for name, tensor in fresh.items()}
    for key, basis in trained.bases.items():
        tensors |= {f"{_BASIS}{part}/{key}": getattr(basis, part) for part in _PARTS}
    save_tensors(folder / TENSORS, tensors, {"format": FORMAT})
    write_settings(folder, _settings(trained, plain, tensors_digest(tensors)))
    return {"fresh": sorted(fresh), "bases_bytes": sum(b.nbytes() for b in trained.bases.values())}


def _settings(trained: TrainedModel, plain: nn.Module, digest: str) -> AdapterSettings:
    recipe, method = trained.recipe, trained.settings
    if trained.bases:
        method = method.with_basis_rank(widest(trained.bases.values()))
    task = task_settings(plain)
    base = AdapterBase(
        name=base_name(recipe.model),
        revision=recipe.model.revision,
        dtype=recipe.model.dtype,
        quantization=recipe.model.quantization,
        auto_class=auto_class(plain),  # type: ignore[arg-type]
        fingerprint=trained.setup.fingerprint,
        num_labels=task["num_labels"],
        id2label={str(number): name for number, name in task["id2label"].items()},
        problem_type=task["problem_type"],
        pad_token_id=task["pad_token_id"],
    )
    return AdapterSettings(
        format=FORMAT,
        model=base,
        method=method,
        scope=recipe.scope,
        seed=recipe.seed,
        targets=tuple(AdapterTarget(**asdict(target)) for target in trained.setup.targets),
        keys=trained.keys,
        digest=digest,
    )


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
    if tensors_digest(tensors) != settings.digest:
        raise FileFormatError("the digest of the tensors differs from adapter.json", where=where)
    if model is None:
        model = _load_base(settings.model, torch.device(device), trust=trust_remote_code)
    targets = [target.target() for target in settings.targets]
    use_frozen_forward(model, getattr(torch, settings.model.dtype))
    _check_base(model, targets, settings.model, str(folder))
    method = settings.method.implementation()
    try:
        bases = _bases(tensors, settings.keys, targets)
        put(model, {n.removeprefix(_FRESH): t for n, t in tensors.items() if n.startswith(_FRESH)})
        tensors = {n: t for n, t in tensors.items() if not n.startswith((_BASIS, _FRESH))}
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
    config = {
        "num_labels": base.num_labels,
        "id2label": names,
        "label2id": {name: number for number, name in names.items()},
        "problem_type": base.problem_type,
        "pad_token_id": base.pad_token_id,
    }
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
    if base.auto_class == CLASSIFIER and labels != base.num_labels:
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
        parts = [tensors[f"{_BASIS}{part}/{key}"] for part in _PARTS]
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
