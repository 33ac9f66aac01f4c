"""The optimizer of a PEFT model with SparseGrad adapters, in one call."""

from __future__ import annotations

import math
from collections.abc import Iterator
from numbers import Real
from typing import Any

import torch
from torch import nn

from sparsegrad_cli.models.sharded_tensors import is_split
from sparsegrad_cli.models.weight_decay import decaying_names
from sparsegrad_cli.numerics.selective_optimizer import Selection, SelectiveAdamW
from sparsegrad_cli.numerics.sizing import REFRESH_STEPS
from sparsegrad_cli.numerics.supports import bounded
from sparsegrad_cli.peft.config import SparseGradConfig
from sparsegrad_cli.peft.layer import SparseGradLayer


def parameter_groups(
    model: nn.Module, *, lr: float, head_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Return the parameters that train as groups for any optimizer: values, head, rest.

    Biases and the parameters of norms do not decay, as in ``transformers.Trainer``.

    Args:
        model: A PEFT model.
        lr: Learning rate of the cores' values and of all others.
        head_lr: Learning rate of the modules of ``modules_to_save``; ``lr`` by default.
        weight_decay: Weight decay, which pulls the change of a weight towards zero.

    Returns:
        Dicts with ``params``, ``lr``, ``weight_decay`` and ``name``; none is empty.
    """
    values = {id(p) for _, _, p in _trained_values(model)}
    decaying = decaying_names(model)
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kind = "values" if id(parameter) in values else "rest"
        if ".modules_to_save." in name:
            kind = "head"
        decays = name in decaying
        rate = head_lr if kind == "head" and head_lr is not None else lr
        group = groups.setdefault(
            kind if decays else f"{kind} without decay",
            {"params": [], "lr": rate, "weight_decay": weight_decay if decays else 0.0},
        )
        group["params"].append(parameter)
    return [{**group, "name": name} for name, group in groups.items()]


def optimizer(
    model: nn.Module,
    *,
    lr: float = 1e-3,
    head_lr: float | None = None,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> torch.optim.Optimizer:
    """Return AdamW for a PEFT model with SparseGrad adapters.

    It is torch's AdamW if the supports are static or dense. Otherwise it chooses in every step
    which parameters of the cores to change: see
    :class:`sparsegrad_cli.numerics.selective_optimizer.SelectiveAdamW`.

    Args:
        model: A PEFT model; adapters that do not train are left out.
        lr: See :func:`parameter_groups`, as for ``head_lr`` and ``weight_decay``.
        head_lr: Learning rate of the head.
        weight_decay: Of cores and other matrices.
        betas: As in ``torch.optim.AdamW``.
        eps: As in ``torch.optim.AdamW``.

    Raises:
        ValueError: A number is out of range, the model has no SparseGrad adapter, no parameter
            trains, an adapter was made from a saved configuration and its weights were not loaded,
            or FSDP has split a core whose parameters the optimizer chooses.
    """
    _check_numbers(lr=lr, head_lr=head_lr, weight_decay=weight_decay, betas=betas, eps=eps)
    if not any(isinstance(module, SparseGradLayer) for module in model.modules()):
        raise ValueError(
            "expected a model with SparseGrad adapters, got one without: wrap it with "
            "peft.get_peft_model(model, SparseGradConfig(basis=...)) first"
        )
    groups = parameter_groups(model, lr=lr, head_lr=head_lr, weight_decay=weight_decay)
    if not groups:
        raise ValueError(
            "no parameter of the model trains: activate an adapter with set_adapter, or load it "
            "with is_trainable=True"
        )
    for layer, name, _ in _trained_values(model):
        if not bool(layer.sparsegrad_q_in[name].any()):
            raise ValueError(
                f"adapter {name!r} has no bases yet: load its weights (PeftModel.from_pretrained), "
                "or give its configuration a basis"
            )
    chosen = selections(model)
    if any(is_split(parameter) for parameter in chosen):
        raise ValueError(
            "dynamic and refresh supports choose among all parameters of a core, which FSDP splits "
            "over processes: use support='static' or 'dense', or DDP"
        )
    if not chosen:
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps)
    made = SelectiveAdamW(groups, chosen, lr=lr, betas=betas, eps=eps)
    # One adapted layer is enough: another optimizer would change all of them.
    watched = next(found for found in _trained_values(model) if found[2] in chosen)
    watched[0].watch_optimizer(watched[1], made)
    return made


def _check_numbers(*, betas: Any, **numbers: Any) -> None:
    for name, value in numbers.items():
        if value is None and name == "head_lr":
            continue
        if not _is_number(value) or not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value!r}: expected a number of at least 0")
    pair = isinstance(betas, tuple | list) and len(betas) == 2
    if not pair or not all(_is_number(beta) and 0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas is {betas!r}: expected two numbers from 0 to below 1")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def selections(model: nn.Module) -> dict[nn.Parameter, Selection]:
    """Return how an optimizer chooses the parameters of the cores; empty if all of them train.

    The adapters may be trained from now on.

    Args:
        model: A model with adapters; those that do not train are left out.
    """
    found = {}
    for layer, name, parameter in _trained_values(model):
        if layer.chosen_by_optimizer(name):
            found[parameter] = _selection(model, layer, name, parameter)
            layer.needs_optimizer[name] = False
    return found


def _trained_values(model: nn.Module) -> Iterator[tuple[SparseGradLayer, str, nn.Parameter]]:
    for layer in model.modules():
        if isinstance(layer, SparseGradLayer):
            for name, parameter in layer.sparsegrad_values.items():
                if parameter.requires_grad:
                    yield layer, name, parameter


def _selection(
    model: nn.Module, layer: SparseGradLayer, name: str, parameter: nn.Parameter
) -> Selection:
    """Return how the optimizer chooses the parameters of a core."""
    configs: dict[str, SparseGradConfig] = model.peft_config  # type: ignore[assignment]
    config, (count, first) = configs[name], layer.chosen_parameters[name]
    if config.support == "refresh":
        return Selection(
            count,
            capacity=count,
            refresh=config.refresh_steps or REFRESH_STEPS,
            first=first,
        )
    room = bounded(config.state_capacity, count, parameter.numel())
    return Selection(count, capacity=room)
