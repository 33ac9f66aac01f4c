"""Write the adapter form: values, positions and bases for the base model.

:mod:`sparsegrad_cli.restore.exported_adapter` describes the files and loads them.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.export.base_model import auto_class, changed_parameters, task_settings
from sparsegrad_cli.io.atomic import save_tensors, write_text_atomic
from sparsegrad_cli.models.digests import tensors_digest
from sparsegrad_cli.models.pretrained import base_name
from sparsegrad_cli.restore.exported_adapter import (
    BASIS,
    FORMAT,
    FRESH,
    PARTS,
    SETTINGS,
    TENSORS,
    AdapterBase,
    AdapterSettings,
    AdapterTarget,
)
from sparsegrad_cli.restore.restore import THRESHOLD, TrainedModel, widest


def write_adapter(trained: TrainedModel, plain: nn.Module, folder: Path) -> dict[str, Any]:
    """Write adapter.safetensors and adapter.json; return their part of the record.

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
    tensors |= {FRESH + name: tensor for name, tensor in fresh.items()}
    for key, basis in trained.bases.items():
        tensors |= {f"{BASIS}{part}/{key}": getattr(basis, part) for part in PARTS}
    save_tensors(folder / TENSORS, tensors, {"format": FORMAT})
    settings = _settings(trained, plain, tensors_digest(sorted(tensors.items())))
    write_text_atomic(folder / SETTINGS, settings.model_dump_json(indent=1) + "\n")
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
        label_threshold=task[THRESHOLD],
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
