"""Names and settings of PEFT folders, which the peft library can load."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from sparsegrad_cli.errors import SparsegradError
from sparsegrad_cli.models.targets import has_experts

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PARTS = ("lora_A", "lora_B")
_NAME = "default"  # of the only adapter in a model; not in the files
# peft wraps modules of these names whole when the task is sequence classification.
_HEADS = ("classifier", "score")


def target_settings(model: nn.Module, names: Iterable[str], dropout: float) -> dict[str, Any]:
    """Return arguments of LoraConfig that adapt the modules of these names and no others.

    Args:
        model: the plain model, or one with adapters.
    """
    if not has_experts(model):
        return {"target_modules": list(names), "lora_dropout": dropout}
    # peft rewrites the names of dense layers in target_modules to those of the experts, here and
    # when the folder is loaded. It takes names of parameters as they are, but without dropout.
    weights = [f"{name}.weight" for name in names]
    return {"target_modules": [], "target_parameters": weights, "lora_dropout": 0.0}


def check_adapted(model: nn.Module, names: Iterable[str], fix: str) -> None:
    """Check that peft adapted the modules of these names and no others.

    Raises:
        SparsegradError: names the first module that differs.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = {name for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    wanted = set(names)
    if adapted == wanted:
        return
    extra, missing = sorted(adapted - wanted), sorted(wanted - adapted)
    differences = [f"it adapted {extra[0]}, which is not a target"] if extra else []
    differences += [f"it left out {missing[0]}, which is a target"] if missing else []
    raise SparsegradError(
        f"expected peft to adapt the {len(wanted)} targets: {' and '.join(differences)}",
        where="method",
        fix=fix,
    )


def modules_to_save(
    model: nn.Module, changed: Iterable[str], targets: Iterable[str], *, classifier: bool
) -> tuple[list[str], list[str]]:
    """Return peft's ``modules_to_save``: the nearest modules that hold what has changed.

    Args:
        changed: names of parameters, none of them a target's.
        targets: names of the targets.
        classifier: whether peft saves its heads whole: parts of them must not be named again.

    Returns:
        The modules in the model's order, and the parameters whose nearest module also holds a
        target: peft would adapt it twice.
    """
    owners: set[str] = set()
    beside = []
    for name in changed:
        owner = name.rpartition(".")[0]
        parts = owner.split(".")
        tops = [".".join(parts[: n + 1]) for n, part in enumerate(parts) if part.endswith(_HEADS)]
        owner = tops[0] if classifier and tops else owner
        inside = f"{owner}." if owner else ""
        if any(target.startswith(inside) or target == owner for target in targets):
            beside.append(name)
        else:
            owners.add(owner)
    outer = {o for o in owners if not any(o.startswith(f"{other}.") for other in owners)}
    order = [name for name, _ in model.named_modules(remove_duplicate=False)]
    return [name for name in order if name in outer], beside


def of_adapter(names: Iterable[str]) -> set[str]:
    """Return the names that belong to a LoRA adapter, or to a variant of LoRA, itself."""
    return {name for name in names if "lora_" in name}


def to_peft(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters of a model with adapters, by the names of a PEFT folder."""
    return {_PREFIX + _without(name): tensor for name, tensor in tensors.items()}


def from_peft(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return parameters by the model's names; the inverse of :func:`to_peft`."""
    return {_with(name.removeprefix(_PREFIX)): tensor for name, tensor in tensors.items()}


def _without(name: str) -> str:
    for part in _PARTS:
        name = name.replace(f".{part}.{_NAME}.", f".{part}.")
    return name


def _with(name: str) -> str:
    path, _, last = name.rpartition(".")
    return f"{path}.{_NAME}.{last}" if path.endswith(_PARTS) else name
