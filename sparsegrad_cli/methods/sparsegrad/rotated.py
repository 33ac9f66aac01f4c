"""SparseGrad (Chekalina et al. 2024): step the largest entries of Q_out' G Q_in.

Two forms, the same method:

*rotated* (the paper's layer): the target holds its core C = Q_out' W Q_in as parameter and computes
y = ((x Q_in) C') Q_out' + b. Three products per pass where a dense layer has one.

*materialized*: the layer stays a plain one; the gradient is rotated once per optimizer step, and
the few stepped entries are rotated back into W. Cost per step does not depend on tokens. In exact
arithmetic both give the same training trajectory.
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
from sparsegrad_cli.methods.sparse_sizing import asked_entries
from sparsegrad_cli.models.precision import open_parameter
from sparsegrad_cli.models.targets import Target
from sparsegrad_cli.numerics.hosvd import Basis
from sparsegrad_cli.numerics.rotation import from_core, from_sparse_core, rotated_linear, to_core
from sparsegrad_cli.numerics.supports import bounded
from sparsegrad_cli.recipe.method_section import SparsegradMethod
from sparsegrad_cli.recipe.schema import TrainSection


class RotatedLinear(nn.Module):
    """The paper's layer: x (..., in) -> ((x Q_in) C') Q_out' + b, (..., out).

    Args:
        weight_OI: W of the layer it replaces, (out, in).
        bias: its bias parameter, kept as it is (never rotated), or None.
        basis: full-rank bases of the target.
    """

    q_out: Tensor
    q_in: Tensor

    def __init__(self, weight_OI: Tensor, bias: nn.Parameter | None, basis: Basis) -> None:
        super().__init__()
        self.weight = nn.Parameter(to_core(weight_OI.detach(), basis))
        self.bias = bias
        # Not part of the state dict: bases live in basis.safetensors, once.
        self.register_buffer("q_out", basis.q_out, persistent=False)
        self.register_buffer("q_in", basis.q_in, persistent=False)
        self._singular = (basis.singular_out, basis.singular_in)

    @property
    def basis(self) -> Basis:
        """The bases, on the layer's device."""
        return Basis(self.q_out, self.q_in, *self._singular)

    def forward(self, x: Tensor) -> Tensor:
        """The plain layer's output, to rounding."""
        return rotated_linear(x, self.weight, self.bias, self.basis)


class Sparsegrad:
    """See :class:`sparsegrad_cli.methods.base.Method`."""

    name = "sparsegrad"
    needs_basis = True
    peft_config = None

    def __init__(self, settings: SparsegradMethod) -> None:
        self.settings = settings
        self._targets: list[Target] = []
        self._asked: Mapping[str, int] = {}
        self._bases: dict[str, Basis] = {}
        self._optimizer: SelectiveAdamW | None = None

    @property
    def _rotated(self) -> bool:
        return self.settings.form == "rotated"

    def prepare(
        self,
        model: nn.Module,
        targets: list[Target],
        *,
        scope: str,
        bases: Mapping[str, Basis] | None = None,
        scores: Mapping[str, Tensor] | None = None,
    ) -> Prepared:
        """Open the targets; with ``rotated``, swap them for layers that hold their core."""
        if bases is None:
            raise ValueError("SparseGrad needs bases")
        total = sum(p.numel() for p in model.parameters())
        head, rest = open_scope(model, targets, scope)
        self._targets, self._asked = targets, asked_entries(self.settings, targets)
        tensors: dict[int, Tensor] = {}
        moved: dict[int, Basis] = {}  # targets that share a basis share its copy on the device
        for target in targets:
            layer = model.get_submodule(target.name)
            assert isinstance(layer.weight, nn.Parameter)
            open_parameter(layer.weight)  # before the bases take its dtype
            given = bases[target.name]
            if id(given) not in moved:
                moved[id(given)] = _on(given, layer.weight)
            basis = self._bases[target.name] = moved[id(given)]
            tensors.update((id(q), q) for q in (basis.q_out, basis.q_in))
            if self._rotated:
                bias = layer.bias if isinstance(layer.bias, nn.Parameter) else None
                layer = RotatedLinear(target.weight_OI(model), bias, basis)
                model.set_submodule(target.name, layer)
        counts = tuple(TargetCount(t, self._asked[t.name]) for t in targets)
        requested = sum(count.entries for count in counts)
        return Prepared(
            Counts(counts, count_parameters(head), count_parameters(rest), total, requested),
            list(tensors.values()),
        )

    def _weight(self, model: nn.Module, target: Target) -> nn.Parameter:
        weight = model.get_submodule(target.name).weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def optimizer(self, model: nn.Module, train: TrainSection) -> torch.optim.Optimizer:
        """AdamW on the largest entries of each core gradient."""
        selections = {}
        for target in self._targets:
            basis = None if self._rotated else self._bases[target.name]
            count = self._asked[target.name]
            room = bounded(self.settings.state_capacity, count, target.size)
            selection = Selection(count, basis, target.transposed, capacity=room)
            selections[self._weight(model, target)] = selection
        self._optimizer = selective_adamw(model, selections, train)
        return self._optimizer

    def _core(self, model: nn.Module, target: Target) -> Tensor:
        if self._rotated:
            return self._weight(model, target).detach()
        return to_core(target.weight_OI(model).detach(), self._bases[target.name])

    def adapter_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Positions and values of the core entries that were stepped, and what the scope opens."""
        touched, values = {}, {}
        for target in self._targets:
            weight = self._weight(model, target)
            touched[target.name] = (
                self._optimizer.touched(weight) if self._optimizer else torch.empty(0).long()
            )
            values[target.name] = self._core(model, target)
        adapted = {f"{target.name}.weight" for target in self._targets}
        return pack_entries(model, touched, values, adapted)

    def load_adapter(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Write the core entries back; in the materialized form, rotated into W."""
        entries = unpack_entries(model, tensors, self._targets)
        with torch.no_grad():
            for target in self._targets:
                positions, values = entries[target.name]
                weight = self._weight(model, target)
                positions, values = positions.to(weight.device), values.to(weight)
                core = self._core(model, target).reshape(-1)
                if self._rotated:
                    weight.view(-1)[positions] = values
                    continue
                delta = values - core[positions]
                weight_OI = target.weight_OI(model)
                weight_OI += from_sparse_core(positions, delta, self._bases[target.name])

    def merged_OI(self, model: nn.Module, target: Target) -> Tensor:
        """W, or the core rotated back."""
        weight_OI = target.weight_OI(model).detach().double()
        if not self._rotated:
            return weight_OI
        return from_core(self._weight(model, target).detach().double(), self._exact(target))

    def _exact(self, target: Target) -> Basis:
        basis = self._bases[target.name]
        return Basis(
            basis.q_out.double(), basis.q_in.double(), basis.singular_out, basis.singular_in
        )

    def factors(self, model: nn.Module, target: Target) -> Factors | None:
        """None: W itself has changed, in directions that add up to full rank."""
        return None


def _on(basis: Basis, like: Tensor) -> Basis:
    return Basis(
        basis.q_out.to(device=like.device, dtype=like.dtype),
        basis.q_in.to(device=like.device, dtype=like.dtype),
        basis.singular_out,
        basis.singular_in,
    )
