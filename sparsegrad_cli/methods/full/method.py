"""Full fine-tuning of the targets: every entry trains."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparsegrad_cli.methods.base import (
    Counts,
    Factors,
    Prepared,
    TargetCount,
    count_parameters,
    load_by_name,
    open_scope,
    trainable_state,
)
from sparsegrad_cli.methods.optimizer import plain_adamw
from sparsegrad_cli.models.precision import open_parameter
from sparsegrad_cli.models.targets import Target
from sparsegrad_cli.numerics.hosvd import Basis
from sparsegrad_cli.recipe.method_section import FullMethod
from sparsegrad_cli.recipe.schema import TrainSection


class Full:
    """See :class:`sparsegrad_cli.methods.base.Method`."""

    name = "full"
    needs_basis = False
    peft_config = None

    def __init__(self, settings: FullMethod) -> None:
        self.settings = settings

    def prepare(
        self,
        model: nn.Module,
        targets: list[Target],
        *,
        scope: str,
        bases: Mapping[str, Basis] | None = None,
        scores: Mapping[str, Tensor] | None = None,
    ) -> Prepared:
        """Open the targets' weights; the model itself is unchanged."""
        total = sum(p.numel() for p in model.parameters())
        head, rest = open_scope(model, targets, scope)
        for target in targets:
            weight = model.get_submodule(target.name).weight
            assert isinstance(weight, nn.Parameter)
            open_parameter(weight)
        entries = tuple(TargetCount(target, target.size) for target in targets)
        counts = Counts(entries, count_parameters(head), count_parameters(rest), total)
        return Prepared(counts)

    def optimizer(self, model: nn.Module, train: TrainSection) -> torch.optim.Optimizer:
        """torch's AdamW."""
        return plain_adamw(model, train)

    def adapter_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """All that trains."""
        return trainable_state(model)

    def load_adapter(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Copy back by name."""
        load_by_name(model, tensors)

    def merged_OI(self, model: nn.Module, target: Target) -> Tensor:
        """The weight as it is."""
        return target.weight_OI(model).detach().double()

    def factors(self, model: nn.Module, target: Target) -> Factors | None:
        """None: W itself has changed."""
        return None
