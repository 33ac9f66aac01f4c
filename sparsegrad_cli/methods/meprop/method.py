"""MeProp, both kinds.

*entries* (the SparseGrad authors' baseline): the largest entries of dL/dW; SparseGrad in the
identity basis. *rows* (Sun et al. 2017): the largest entries of dL/dy per example or per batch, so
that back-propagation itself runs through them.
"""

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
    open_scope,
)
from sparsegrad_cli.methods.optimizer import Selection, SelectiveAdamW, selective_adamw
from sparsegrad_cli.methods.sparse_adapter import pack_entries, unpack_entries
from sparsegrad_cli.methods.sparse_sizing import asked_entries, asked_rows
from sparsegrad_cli.models.precision import open_parameter
from sparsegrad_cli.models.targets import Target
from sparsegrad_cli.numerics.hosvd import Basis
from sparsegrad_cli.numerics.meprop import meprop_linear
from sparsegrad_cli.numerics.supports import bounded
from sparsegrad_cli.recipe.method_section import MepropMethod
from sparsegrad_cli.recipe.schema import TrainSection


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
        """The plain layer's output."""
        weight = self.weight.T if self.transposed else self.weight
        assert self.bias is None or isinstance(self.bias, Tensor)
        return meprop_linear(x, weight, self.bias, k=self.k, unified=self.unified)


class Meprop:
    """See :class:`sparsegrad_cli.methods.base.Method`."""

    name = "meprop"
    needs_basis = False
    peft_config = None

    def __init__(self, settings: MepropMethod) -> None:
        self.settings = settings
        self._targets: list[Target] = []
        self._asked: Mapping[str, int] = {}
        self._optimizer: SelectiveAdamW | None = None

    def prepare(
        self,
        model: nn.Module,
        targets: list[Target],
        *,
        scope: str,
        bases: Mapping[str, Basis] | None = None,
        scores: Mapping[str, Tensor] | None = None,
    ) -> Prepared:
        """Open the targets' weights; with ``rows``, swap the layers for ones that prune dL/dy."""
        total = sum(p.numel() for p in model.parameters())
        head, rest = open_scope(model, targets, scope)
        self._targets, self._asked = targets, asked_entries(self.settings, targets)
        rows = asked_rows(self.settings, targets)
        counts = []
        for target in targets:
            layer = model.get_submodule(target.name)
            assert isinstance(layer.weight, nn.Parameter)
            open_parameter(layer.weight)
            if self.settings.select == "rows":
                k = rows[target.name]
                swapped = MepropLinear(
                    layer, k, unified=self.settings.unified, transposed=target.transposed
                )
                model.set_submodule(target.name, swapped)
                counts.append(TargetCount(target, k * target.in_features))
            else:
                counts.append(TargetCount(target, self._asked[target.name]))
        requested = sum(self._asked.values())
        note = "rows: entries per example; a batch may touch more" if self._per_example else ""
        return Prepared(
            Counts(
                tuple(counts),
                count_parameters(head),
                count_parameters(rest),
                total,
                requested,
                note,
            )
        )

    @property
    def _per_example(self) -> bool:
        return self.settings.select == "rows" and not self.settings.unified

    def optimizer(self, model: nn.Module, train: TrainSection) -> torch.optim.Optimizer:
        """AdamW on the chosen entries; with ``rows``, on those that got a gradient at all."""
        selections = {}
        for target in self._targets:
            weight = model.get_submodule(target.name).weight
            assert isinstance(weight, nn.Parameter)
            count = None if self.settings.select == "rows" else self._asked[target.name]
            room = bounded(self.settings.state_capacity, count or 0, target.size)
            selections[weight] = Selection(count, capacity=room)
        self._optimizer = selective_adamw(model, selections, train)
        return self._optimizer

    def adapter_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Positions and values of the entries that were stepped, and what the scope opens."""
        touched, values = {}, {}
        for target in self._targets:
            weight = model.get_submodule(target.name).weight
            assert isinstance(weight, nn.Parameter)
            touched[target.name] = (
                self._optimizer.touched(weight) if self._optimizer else torch.empty(0).long()
            )
            values[target.name] = weight
        adapted = {f"{target.name}.weight" for target in self._targets}
        return pack_entries(model, touched, values, adapted)

    def load_adapter(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Write the entries back into the weights."""
        entries = unpack_entries(model, tensors, self._targets)
        with torch.no_grad():
            for name, (positions, values) in entries.items():
                weight = model.get_submodule(name).weight
                assert isinstance(weight, nn.Parameter)
                weight.view(-1)[positions.to(weight.device)] = values.to(weight)

    def merged_OI(self, model: nn.Module, target: Target) -> Tensor:
        """The weight as it is."""
        return target.weight_OI(model).detach().double()

    def factors(self, model: nn.Module, target: Target) -> Factors | None:
        """None: W itself has changed."""
        return None
