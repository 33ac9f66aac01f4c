"""SparseGrad (Chekalina et al. 2024) in two forms: step the largest entries of Q_out' G Q_in.

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

from sparsegrad_cli.methods.implementation import Adapted, Plan, weight_of
from sparsegrad_cli.methods.sparse_method import SparseMethod
from sparsegrad_cli.methods.sparsegrad.settings import SparsegradSettings
from sparsegrad_cli.models.precision import unfreeze_parameter
from sparsegrad_cli.models.targets import Target
from sparsegrad_cli.numerics.hosvd import Basis, map_bases
from sparsegrad_cli.numerics.rotation import from_core, from_sparse_core, rotated_linear, to_core
from sparsegrad_cli.numerics.selective_optimizer import Selection
from sparsegrad_cli.numerics.supports import bounded


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
        """Return the bases, on the layer's device."""
        return Basis(self.q_out, self.q_in, *self._singular)

    def forward(self, x: Tensor) -> Tensor:
        """Return the plain layer's output, to rounding."""
        return rotated_linear(x, self.weight, self.bias, self.basis)


class Sparsegrad(SparseMethod):
    """The forms ``rotated`` and ``materialized``.

    See :class:`sparsegrad_cli.methods.implementation.Method`.
    """

    settings: SparsegradSettings

    def __init__(self, settings: SparsegradSettings) -> None:
        super().__init__(settings)
        self._rotated = settings.form == "rotated"
        self._bases: dict[str, Basis] = {}

    def planned(
        self, targets: list[Target], bases: Mapping[str, Basis], scores: Mapping[str, Tensor]
    ) -> dict[str, Plan]:
        """Return the number of entries; every step chooses them."""
        return {name: Plan(n, None) for name, n in self.settings.requested(targets).items()}

    def adapt(
        self,
        model: nn.Module,
        targets: list[Target],
        bases: Mapping[str, Basis],
        scores: Mapping[str, Tensor],
    ) -> Adapted:
        """Unfreeze the targets; with ``rotated``, swap in layers that hold their core."""
        self.targets, self.requested = targets, self.settings.requested(targets)
        weights = {target.name: weight_of(model, target) for target in targets}
        for weight in weights.values():
            unfreeze_parameter(weight)  # Before the bases take its dtype.
        self._bases = map_bases(
            {name: bases[name] for name in weights},
            lambda name, basis: basis.to(weights[name].dtype, weights[name].device),
        )
        for target in targets if self._rotated else ():
            layer = model.get_submodule(target.name)
            bias = layer.bias if isinstance(layer.bias, nn.Parameter) else None
            rotated = RotatedLinear(target.weight_OI(model), bias, self._bases[target.name])
            model.set_submodule(target.name, rotated)
        return Adapted(self.requested, sum(self.requested.values()), bases=self._bases)

    def selection(self, target: Target) -> Selection:
        """Take the largest entries of the core gradient."""
        basis = None if self._rotated else self._bases[target.name]
        count = self.requested[target.name]
        room = bounded(self.settings.state_capacity, count, target.size)
        return Selection(count, basis, target.transposed, capacity=room)

    def matrix(self, model: nn.Module, target: Target) -> Tensor:
        """Return the core."""
        if self._rotated:
            return weight_of(model, target).detach()
        return to_core(target.weight_OI(model).detach(), self._bases[target.name])

    def write(self, model: nn.Module, target: Target, positions: Tensor, values: Tensor) -> None:
        """Set entries of the core; in the materialized form, rotate their change into W."""
        if self._rotated:
            super().write(model, target, positions, values)
            return
        delta = values - self.matrix(model, target).reshape(-1)[positions]
        weight_OI = target.weight_OI(model)
        weight_OI += from_sparse_core(positions, delta, self._bases[target.name])

    def merged_OI(self, model: nn.Module, target: Target) -> Tensor:
        """Return W, or the core rotated back."""
        if not self._rotated:
            return super().merged_OI(model, target)
        exact = self._bases[target.name].to(torch.float64)
        return from_core(weight_of(model, target).detach().double(), exact)
