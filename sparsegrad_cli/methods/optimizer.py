"""Make the optimizer of a run: which parameters decay, and which are stepped entry by entry."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from sparsegrad_cli.models.weight_decay import decaying_names
from sparsegrad_cli.numerics.selective_optimizer import Selection, SelectiveAdamW
from sparsegrad_cli.recipe.schema import TrainSection


def plain_adamw(model: nn.Module, train: TrainSection) -> torch.optim.AdamW:
    """Return torch's AdamW on all parameters that train, with a recipe's hyperparameters."""
    return torch.optim.AdamW(_groups(*by_decay(model, train)), **adamw_settings(train))


def selective_adamw(
    model: nn.Module, selections: Mapping[nn.Parameter, Selection], train: TrainSection
) -> SelectiveAdamW:
    """Return AdamW on the selections, and on all entries of other parameters that train."""
    decayed, undecayed = by_decay(model, train, without=selections)
    groups = [{"params": list(selections)}, *_groups(decayed, undecayed)]
    return SelectiveAdamW(groups, selections, **adamw_settings(train))


def by_decay(
    model: nn.Module, train: TrainSection, without: Container[nn.Parameter] = ()
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Split the parameters that train into those that decay and those that do not.

    See :func:`decaying_names`. Without weight decay all of them count as decaying.

    Args:
        without: parameters to leave out.
    """
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and p not in without}
    if not train.weight_decay:
        return list(trained.values()), []
    decaying = decaying_names(model)
    decayed = [parameter for name, parameter in trained.items() if name in decaying]
    return decayed, [parameter for name, parameter in trained.items() if name not in decaying]


def _groups(
    decayed: Iterable[nn.Parameter], undecayed: Iterable[nn.Parameter]
) -> list[dict[str, Any]]:
    """Return parameter groups of an optimizer; none is empty."""
    groups: list[dict[str, Any]] = [
        {"params": list(decayed)},
        {"params": list(undecayed), "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def adamw_settings(train: TrainSection) -> dict[str, Any]:
    """Return AdamW's keyword arguments from a recipe."""
    return {
        "lr": train.learning_rate,
        "betas": (train.adam_beta1, train.adam_beta2),
        "eps": train.adam_epsilon,
        "weight_decay": train.weight_decay,
    }
