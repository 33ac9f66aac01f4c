"""SparseGrad's core form: W stays frozen, S on its support trains (numerics/core_linear.py).

The trained parameter is a flat vector of values (``support: static``), the whole of S (``dense``),
or S of which a few entries are stepped at a time: ``dynamic`` chooses the largest in every step, as
the paper does, and ``refresh`` holds a choice for some steps; entries that leave the support keep
their value and lose their state. Any optimizer can train the first two.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparsegrad_cli.methods.implementation import (
    Adapted,
    Factors,
    Method,
    Plan,
    load_by_name,
    trainable_state,
)
from sparsegrad_cli.methods.optimizer import make_optimizer, selective_adamw
from sparsegrad_cli.methods.sparse_method import check_positions
from sparsegrad_cli.methods.sparsegrad.settings import SparsegradSettings
from sparsegrad_cli.models.quantized import dtype_of, is_quantized
from sparsegrad_cli.models.targets import Target
from sparsegrad_cli.numerics.core_linear import core_linear, effective_weight
from sparsegrad_cli.numerics.frozen_linear import core_beside
from sparsegrad_cli.numerics.hosvd import Basis, map_bases, truncated
from sparsegrad_cli.numerics.lowrank import structural_factors
from sparsegrad_cli.numerics.selective_optimizer import Selection
from sparsegrad_cli.numerics.sizing import REFRESH_STEPS
from sparsegrad_cli.numerics.supports import bounded
from sparsegrad_cli.peft.plan import CorePlan, plan_cores
from sparsegrad_cli.recipe.schema import TrainSection


class CoreLinear(nn.Module):
    """A frozen linear layer with a trainable core beside it: W + Q_out S Q_in'.

    Args:
        weight: the frozen parameter of the layer it replaces: (out, in), or its transpose.
        bias: its bias parameter or None.
        basis: truncated bases; buffers outside the state dict.
        support: (k,) flat positions in S (below 2^31) that train; None trains all of S.
        transposed: the weight holds W'.
    """

    q_out: Tensor
    q_in: Tensor
    support: Tensor

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        basis: Basis,
        support: Tensor | None,
        *,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.weight, self.bias, self.transposed = weight, bias, transposed
        self._make_core(basis, support, weight.dtype, weight.device)

    def _make_core(
        self, basis: Basis, support: Tensor | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.register_buffer("q_out", basis.q_out, persistent=False)
        self.register_buffer("q_in", basis.q_in, persistent=False)
        self.static = support is not None
        self.shape = (basis.q_out.shape[1], basis.q_in.shape[1])
        # The core is float32 or wider whatever the weight is: small increments must not be lost.
        dtype = torch.promote_types(dtype, torch.float32)
        if support is None:
            self.core = nn.Parameter(torch.zeros(self.shape, dtype=dtype, device=device))
        else:
            # Persistent: values without their positions are useless. Four bytes each.
            self.register_buffer("support", support.to(device, torch.int32))
            zeros = torch.zeros(len(support), dtype=dtype, device=device)
            self.values = nn.Parameter(zeros)

    def core_RS(self) -> Tensor:
        """Return S, (r_out, r_in)."""
        if "core" in self._parameters:
            return self.core
        flat = self.values.new_zeros(self.shape[0] * self.shape[1])
        return flat.index_put((self.support,), self.values).view(self.shape)

    @property
    def trained(self) -> nn.Parameter:
        """The parameter that holds S or its values."""
        return self.core if "core" in self._parameters else self.values

    def forward(self, x: Tensor) -> Tensor:
        """Return the output; that of the plain layer while S is zero."""
        weight = self.weight.T if self.transposed else self.weight
        return core_linear(x, weight, self.bias, self.core_RS(), self.q_out, self.q_in)


class QuantizedCoreLinear(CoreLinear):
    """A core beside a quantized layer, which makes its product itself.

    Args:
        base_layer: a layer of bitsandbytes that saves nothing
            (:func:`sparsegrad_cli.models.quantized.use_frozen_forward`); it is kept whole, because
            it holds the scales.
        basis, support: as in :class:`CoreLinear`.
    """

    def __init__(self, base_layer: nn.Module, basis: Basis, support: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.base_layer, self.transposed = base_layer, False
        device = next(base_layer.parameters()).device
        self._make_core(basis, support, dtype_of(base_layer), device)

    # Under the plain layer's attribute names, which are not parameters of this module.
    def __getattr__(self, name: str) -> Tensor | nn.Module:
        if name in ("weight", "bias"):
            found: Tensor | nn.Module = getattr(self.base_layer, name)
            return found
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output; that of the quantized layer while S is zero."""
        return core_beside(x, self.base_layer, self.core_RS(), self.q_out, self.q_in)


class SparsegradCore(Method):
    """See :class:`sparsegrad_cli.methods.implementation.Method`."""

    settings: SparsegradSettings

    def __init__(self, settings: SparsegradSettings) -> None:
        super().__init__(settings)
        self._layers: dict[str, CoreLinear] = {}
        self._counts: dict[str, int] = {}
        self._first: dict[str, Tensor] = {}

    def planned(
        self, targets: list[Target], bases: Mapping[str, Basis], scores: Mapping[str, Tensor]
    ) -> dict[str, Plan]:
        """Return the supports that calibration chooses, or their sizes."""
        plans = self._plans(targets, bases, scores)
        return {name: Plan(plan.count, plan.positions) for name, plan in plans.items()}

    def _plans(
        self, targets: list[Target], bases: Mapping[str, Basis], scores: Mapping[str, Tensor]
    ) -> dict[str, CorePlan]:
        dense = self.settings.support == "dense"
        return plan_cores(
            {t.name: bases[t.name] for t in targets},
            scores,
            {} if dense else self.settings.requested(targets),
            support=self.settings.support,
            allocation=self.settings.allocation,
        )

    def adapt(
        self,
        model: nn.Module,
        targets: list[Target],
        bases: Mapping[str, Basis],
        scores: Mapping[str, Tensor],
    ) -> Adapted:
        """Put a core beside every target. S starts at zero, so the function is unchanged."""
        rank = self.settings.rank
        assert isinstance(rank, int | float)  # the settings are settled

        def fit(name: str, basis: Basis) -> Basis:
            # In the dtype in which the products are made: half the bytes for half precision.
            layer = model.get_submodule(name)
            return truncated(basis, rank).to(dtype_of(layer), next(layer.parameters()).device)

        fitted = map_bases({t.name: bases[t.name] for t in targets}, fit)
        plans = self._plans(targets, fitted, scores)
        self._counts = {name: plan.count for name, plan in plans.items()}
        if self.settings.support == "refresh":
            self._first = {n: p.positions for n, p in plans.items() if p.positions is not None}
        for target in targets:
            plan = plans[target.name]
            positions = plan.positions if self.settings.support == "static" else None
            core = _core(model, target, plan.basis, positions)
            self._layers[target.name] = core
            model.set_submodule(target.name, core)
        dense = self.settings.support == "dense"
        requested = None if dense else sum(self.settings.requested(targets).values())
        ranks = sorted({"x".join(map(str, layer.shape)) for layer in self._layers.values()})
        return Adapted(self._counts, requested, f"core {', '.join(ranks)}", fitted)

    def optimizer(self, model: nn.Module, train: TrainSection) -> torch.optim.Optimizer:
        """Return that of ``train.optim``; for a changing support, AdamW on chosen entries of S."""
        if self.settings.support in ("static", "dense"):
            return make_optimizer(model, train)
        selections = {
            layer.trained: self._selection(name, layer) for name, layer in self._layers.items()
        }
        return selective_adamw(model, selections, train)

    def _selection(self, name: str, layer: CoreLinear) -> Selection:
        count = self._counts[name]
        if self.settings.support == "refresh":
            steps = self.settings.refresh_steps or REFRESH_STEPS
            # Not kept here: from the first step on it is optimizer state.
            return Selection(count, capacity=count, refresh=steps, first=self._first.pop(name))
        room = bounded(self.settings.state_capacity, count, layer.trained.numel())
        return Selection(count, capacity=room)

    def support(self, target: Target) -> tuple[Tensor, tuple[int, int]] | None:
        """Return the static support and the shape of the core."""
        layer = self._layers[target.name]
        return (layer.support, layer.shape) if layer.static else None

    def adapter_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Return values (or S), their positions, and what the scope opens."""
        tensors = trainable_state(model)
        for name, layer in self._layers.items():
            if layer.static:
                tensors[f"{name}.support"] = layer.support.cpu()
        return tensors

    def load_adapter(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Load by name, positions too: the adapter does not depend on how they were chosen."""
        positions = {n: t for n, t in tensors.items() if n.endswith(".support")}
        fixed = {n: layer for n, layer in self._layers.items() if layer.static}
        for name, layer in fixed.items():
            room = layer.shape[0] * layer.shape[1]
            check_positions(name, positions[f"{name}.support"], layer.values, room)
        load_by_name(model, {n: t for n, t in tensors.items() if n not in positions})
        for name, layer in fixed.items():
            layer.support.copy_(positions[f"{name}.support"])

    def merged_OI(self, model: nn.Module, target: Target) -> Tensor:
        """Return W + Q_out S Q_in'."""
        layer = self._layers[target.name]
        weight_OI = target.weight_OI(model).detach().double()
        core_RS = layer.core_RS().detach().double()
        return effective_weight(weight_OI, core_RS, layer.q_out.double(), layer.q_in.double())

    def factors(self, model: nn.Module, target: Target) -> Factors | None:
        """Return B = Q_out L and A = M Q_in', where S = L M has the term rank of S's support.

        For a static support that is the rank of almost every S that it allows, and below r.
        """
        layer = self._layers[target.name]
        core_RS = layer.core_RS().detach().double()
        if layer.static:
            pattern = torch.zeros(core_RS.numel(), dtype=torch.bool)
            pattern[layer.support.long().cpu()] = True
            pattern_RS = pattern.view(layer.shape)
        else:
            pattern_RS = core_RS != 0
        left, right = structural_factors(core_RS, pattern_RS)
        b_OR, a_RI = layer.q_out.double() @ left, right @ layer.q_in.double().T
        return Factors(b_OR, a_RI, b_OR.shape[1])


def _core(model: nn.Module, target: Target, basis: Basis, support: Tensor | None) -> CoreLinear:
    """Return the layer that replaces a target."""
    layer = model.get_submodule(target.name)
    if is_quantized(layer):
        return QuantizedCoreLinear(layer, basis, support)
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, nn.Parameter)
    assert bias is None or isinstance(bias, nn.Parameter)
    return CoreLinear(weight, bias, basis, support, transposed=target.transposed)
