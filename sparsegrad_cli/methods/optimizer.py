"""Make the optimizer of a run: parameter groups by learning rate and decay, and the class."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Set
from typing import Any

import torch
from torch import nn

from sparsegrad_cli.models.targets import head_parameters, pooler_parameters
from sparsegrad_cli.models.weight_decay import decaying_names
from sparsegrad_cli.numerics.selective_optimizer import Selection, SelectiveAdamW
from sparsegrad_cli.recipe.optimizers import OPTIMIZERS, parse_arguments
from sparsegrad_cli.recipe.schema import TrainSection

_LORA_B = ("lora_B", "lora_embedding_B")


def make_optimizer(
    model: nn.Module, train: TrainSection, undecayed: Set[nn.Parameter] = frozenset()
) -> torch.optim.Optimizer:
    """Return the optimizer ``train.optim`` on all parameters that train.

    Each is the class that ``transformers.Trainer`` makes for this name, with the same arguments.

    Args:
        undecayed: parameters that do not decay, whatever their names.
    """
    groups = parameter_groups(model, train, undecayed=undecayed)
    options: dict[str, Any] = {"lr": train.learning_rate, "weight_decay": train.weight_decay}
    if train.optim_args is not None:
        options |= parse_arguments(train.optim, train.optim_args)
    if OPTIMIZERS[train.optim].of_bitsandbytes:
        return _of_bitsandbytes(groups, options, train)
    if train.optim == "adafactor":
        from transformers.optimization import Adafactor

        options |= {"scale_parameter": False, "relative_step": False}
        adafactor: torch.optim.Optimizer = Adafactor(groups, **options)
        return adafactor
    if train.optim in ("adamw_torch", "adamw_torch_fused"):
        fused = train.optim == "adamw_torch_fused" or None
        return torch.optim.AdamW(groups, fused=fused, **adamw_settings(train))
    made: torch.optim.Optimizer = {
        "sgd": torch.optim.SGD,
        "adagrad": torch.optim.Adagrad,
        "rmsprop": torch.optim.RMSprop,
    }[train.optim](groups, **options)
    return made


def _of_bitsandbytes(
    groups: list[dict[str, Any]], options: dict[str, Any], train: TrainSection
) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW, Lion

    facts, betas = OPTIMIZERS[train.optim], (train.adam_beta1, train.adam_beta2)
    options |= {"betas": betas, "optim_bits": facts.bits, "is_paged": "paged" in train.optim}
    if "adam" in train.optim:
        options["eps"] = train.adam_epsilon
    made: torch.optim.Optimizer = (AdamW if "adam" in train.optim else Lion)(groups, **options)
    return made


def selective_adamw(
    model: nn.Module,
    selections: Mapping[nn.Parameter, Selection],
    train: TrainSection,
    make: Callable[..., SelectiveAdamW] = SelectiveAdamW,
) -> SelectiveAdamW:
    """Return AdamW on the selections, and on all entries of other parameters that train.

    Args:
        make: the optimizer's class, or a function with the same arguments.
    """
    groups = [{"params": list(selections)}, *parameter_groups(model, train, without=selections)]
    return make(groups, selections, **adamw_settings(train))


def parameter_groups(
    model: nn.Module,
    train: TrainSection,
    without: Container[nn.Parameter] = (),
    undecayed: Set[nn.Parameter] = frozenset(),
) -> list[dict[str, Any]]:
    """Return the parameters that train as groups of an optimizer; none is empty.

    The head and the pooler have ``head_learning_rate``, and B of LoRA ``lora_plus_ratio`` times the
    learning rate (LoRA+, Hayou et al. 2024, arXiv 2402.12354). Groups with the plain learning rate
    come first; those that decay (:func:`decaying_names`) come before those that do not. Without
    weight decay all parameters count as decaying.

    Args:
        without: parameters to leave out.
        undecayed: parameters that do not decay, whatever their names.
    """
    head, decaying = head_parameters(model), decaying_names(model)
    head |= pooler_parameters(model)
    rates = [train.learning_rate]
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or parameter in without:
            continue
        rate = train.learning_rate
        if name in head:
            rate = train.head_learning_rate or rate
        elif any(f".{part}." in name for part in _LORA_B):
            rate *= train.lora_plus_ratio or 1
        decays = not train.weight_decay or (name in decaying and parameter not in undecayed)
        rates.append(rate)
        groups.setdefault((rate, decays), []).append(parameter)
    order = sorted(groups, key=lambda kind: (rates.index(kind[0]), not kind[1]))
    return [_group(groups[kind], kind, train) for kind in order]


def _group(
    parameters: list[nn.Parameter], kind: tuple[float, bool], train: TrainSection
) -> dict[str, Any]:
    rate, decays = kind
    group: dict[str, Any] = {"params": parameters}
    if rate != train.learning_rate:
        group["lr"] = rate
    if not decays:
        group["weight_decay"] = 0.0
    return group


def adamw_settings(train: TrainSection) -> dict[str, Any]:
    """Return AdamW's keyword arguments from a recipe."""
    return {
        "lr": train.learning_rate,
        "betas": (train.adam_beta1, train.adam_beta2),
        "eps": train.adam_epsilon,
        "weight_decay": train.weight_decay,
    }
