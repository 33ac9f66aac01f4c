"""Full fine-tuning of the targets: every parameter trains."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from sparsegrad_cli.methods.implementation import (
    Counts,
    Method,
    Prepared,
    TargetCount,
    count_parameters,
    open_scope,
    weight_of,
)
from sparsegrad_cli.models.precision import unfreeze_parameter
from sparsegrad_cli.models.targets import Target
from sparsegrad_cli.numerics.hosvd import Basis


class Full(Method):
    """See :class:`sparsegrad_cli.methods.implementation.Method`."""

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
            unfreeze_parameter(weight_of(model, target))
        trained = tuple(TargetCount(target, target.size) for target in targets)
        counts = Counts(trained, count_parameters(head), count_parameters(rest), total)
        return Prepared(counts)
