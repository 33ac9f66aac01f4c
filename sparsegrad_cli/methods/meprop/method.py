"""MeProp in two forms.

*entries* (the SparseGrad authors' baseline): the largest entries of dL/dW; SparseGrad in the
identity basis. *rows* (Sun et al. 2017): the largest entries of dL/dy per example or per batch, so
that back-propagation itself runs through them.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from sparsegrad_cli.methods.implementation import Adapted, weight_of
from sparsegrad_cli.methods.meprop.settings import MepropSettings
from sparsegrad_cli.methods.sparse_method import SparseMethod
from sparsegrad_cli.models.precision import unfreeze_parameter
from sparsegrad_cli.models.targets import Target
from sparsegrad_cli.numerics.hosvd import Basis
from sparsegrad_cli.numerics.meprop import meprop_linear
from sparsegrad_cli.numerics.selective_optimizer import Selection
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

    def adapt(
        self,
        model: nn.Module,
        targets: list[Target],
        bases: Mapping[str, Basis],
        scores: Mapping[str, Tensor],
    ) -> Adapted:
        """Unfreeze the targets' weights; with ``rows``, swap in layers that prune dL/dy."""
        self.targets, self.requested = targets, self.settings.requested(targets)
        rows = self.settings.rows(targets) if self._by_rows else {}
        entries, unified = dict(self.requested), self.settings.unified
        for target in targets:
            unfreeze_parameter(weight_of(model, target))
            if self._by_rows:
                k, layer = rows[target.name], model.get_submodule(target.name)
                swapped = MepropLinear(layer, k, unified=unified, transposed=target.transposed)
                model.set_submodule(target.name, swapped)
                entries[target.name] = k * target.in_features
        per_example = self._by_rows and not unified
        note = "rows: entries per example; a batch may touch more" if per_example else ""
        return Adapted(entries, sum(self.requested.values()), note)

    @property
    def _by_rows(self) -> bool:
        return self.settings.select == "rows"

    def selection(self, target: Target) -> Selection:
        """Take the largest parameters; with ``rows``, those that got a gradient at all."""
        count = None if self._by_rows else self.requested[target.name]
        room = bounded(self.settings.state_capacity, count or 0, target.size)
        return Selection(count, capacity=room)
