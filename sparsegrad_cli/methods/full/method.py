"""Full fine-tuning of the targets: every parameter trains."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from sparsegrad_cli.methods.implementation import Adapted, Method, weight_of
from sparsegrad_cli.models.precision import unfreeze_parameter
from sparsegrad_cli.models.targets import Target
from sparsegrad_cli.numerics.hosvd import Basis


class Full(Method):
    """See :class:`sparsegrad_cli.methods.implementation.Method`."""

    def adapt(
        self,
        model: nn.Module,
        targets: list[Target],
        bases: Mapping[str, Basis],
        scores: Mapping[str, Tensor],
    ) -> Adapted:
        """Unfreeze the targets' weights; the model itself is unchanged."""
        for target in targets:
            unfreeze_parameter(weight_of(model, target))
        return Adapted({target.name: target.size for target in targets})
