"""MeProp in two forms.

*entries* (the SparseGrad authors' baseline): the largest entries of dL/dW; SparseGrad in the
identity basis. *rows* (Sun et al. 2017): the largest entries of dL/dy per example or per batch, so
that back-propagation itself runs through them.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from sparsegrad_cli.methods.implementation import (
    Counts,
    Prepared,
    TargetCount,
    count_parameters,
    open_scope,
    weight_of,
)
from sparsegrad_cli.methods.meprop.settings import MepropSettings
from sparsegrad_cli.methods.optimizer import Selection
from sparsegrad_cli.methods.sparse_method import SparseMethod
from sparsegrad_cli.models.precision import unfreeze_parameter
from sparsegrad_cli.models.targets import Target
from sparsegrad_cli.numerics.hosvd import Basis
from sparsegrad_cli.numerics.meprop import meprop_linear
from sparsegrad_cli.numerics.supports import bounded


class MepropLinear(nn.Module):
    """A linear layer that back-propagates through k outputs per example; shares its parameters.

    x (..., in) -> (..., out). W is (out, in), or (in, out) when ``transposed``.
    """

    def __init__(self, layer: nn.Module, k: int, *, unified: bool, transposed: bool) -> None:
        super().__init__()
        assert isinstance(layer.weight, nn.Parameter)
        self.weight = layer.weight
        self.bias = layer.bias
        self.k, self.unified, self.transposed = k, unified, transposed

    def forward(self, x: Tensor) -> Tensor:
        """Return the plain layer's output."""
        weight = self.weight.T if self.transposed else self.weight
        assert self.bias is None or isinstance(self.bias, Tensor)
        return meprop_linear(x, weight, self.bias, k=self.k, unified=self.unified)


class Meprop(SparseMethod):
    """See :class:`sparsegrad_cli.methods.implementation.Method`."""

    settings: MepropSettings

    def prepare(
        self,
        model: nn.Module,
        targets: list[Target],
        *,
        scope: str,
        bases: Mapping[str, Basis] | None = None,
        scores: Mapping[str, Tensor] | None = None,
    ) -> Prepared:
        """Open the targets' weights; with ``rows``, swap in layers that prune dL/dy."""
        total = sum(p.numel() for p in model.parameters())
        head, rest = open_scope(model, targets, scope)
        self.targets, self.requested = targets, self.settings.requested(targets)
        rows = self.settings.rows(targets) if self._by_rows else {}
        counts, unified = [], self.settings.unified
        for target in targets:
            unfreeze_parameter(weight_of(model, target))
            count = self.requested[target.name]
            if self._by_rows:
                k, layer = rows[target.name], model.get_submodule(target.name)
                swapped = MepropLinear(layer, k, unified=unified, transposed=target.transposed)
                model.set_submodule(target.name, swapped)
                count = k * target.in_features
            counts.append(TargetCount(target, count))
        per_example = self._by_rows and not unified
        return Prepared(
            Counts(
                tuple(counts),
                count_parameters(head),
                count_parameters(rest),
                total,
                sum(self.requested.values()),
                "rows: entries per example; a batch may touch more" if per_example else "",
            )
        )

    @property
    def _by_rows(self) -> bool:
        return self.settings.select == "rows"

    def selection(self, target: Target) -> Selection:
        """Take the largest parameters; with ``rows``, those that got a gradient at all."""
        count = None if self._by_rows else self.requested[target.name]
        room = bounded(self.settings.state_capacity, count or 0, target.size)
        return Selection(count, capacity=room)
