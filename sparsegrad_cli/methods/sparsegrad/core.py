"""SparseGrad's core form as a method: the tuner of :mod:`sparsegrad_cli.peft` in the targets.

W stays frozen, and S on its support trains (numerics/core_linear.py).

The trained parameter is a flat vector of values (``support: static``), the whole of S (``dense``),
or S of which a few entries are stepped at a time: ``dynamic`` chooses the largest in every step, as
the paper does, and ``refresh`` holds a choice for some steps; entries that leave the support keep
their value and lose their state. Any optimizer can train the first two.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

import torch
from peft import inject_adapter_in_model
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
from sparsegrad_cli.methods.peft_folder import check_adapted
from sparsegrad_cli.methods.sparse_method import check_positions
from sparsegrad_cli.methods.sparsegrad.settings import SparsegradSettings
from sparsegrad_cli.models.quantized import dtype_of, is_quantized
from sparsegrad_cli.models.targets import Target
from sparsegrad_cli.numerics.core_linear import effective_weight
from sparsegrad_cli.numerics.hosvd import Basis, map_bases, truncated
from sparsegrad_cli.numerics.lowrank import structural_factors
from sparsegrad_cli.peft import SparseGradConfig, SparseGradLayer, SparseGradModel
from sparsegrad_cli.peft.optimizer import selections
from sparsegrad_cli.peft.plan import CorePlan, PlannedCores, plan_cores
from sparsegrad_cli.recipe.schema import TrainSection

_ADAPTER = "default"
_VALUES, _BIAS = f".sparsegrad_values.{_ADAPTER}", ".base_layer.bias"


class SparsegradCore(Method):
    """See :class:`sparsegrad_cli.methods.implementation.Method`."""

    settings: SparsegradSettings

    def __init__(self, settings: SparsegradSettings) -> None:
        super().__init__(settings)
        self._layers: dict[str, SparseGradLayer] = {}

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
            dtype = self.autocast or dtype_of(layer)
            return truncated(basis, rank).to(dtype, next(layer.parameters()).device)

        fitted = map_bases({t.name: bases[t.name] for t in targets}, fit)
        plans = self._plans(targets, fitted, scores)
        self._layers = _with_cores(model, self._config(plans))
        counts = {name: plan.count for name, plan in plans.items()}
        dense = self.settings.support == "dense"
        requested = None if dense else sum(self.settings.requested(targets).values())
        shapes = {layer.core_shape(_ADAPTER) for layer in self._layers.values()}
        sides = " or ".join(sorted(" x ".join(map(str, shape)) for shape in shapes))
        note = f"each target module trains inside a core of {sides} (method.rank)"
        return Adapted(counts, requested, note, fitted)

    def _config(self, plans: Mapping[str, CorePlan]) -> SparseGradConfig:
        """Return the configuration by which a PEFT user gets these cores."""
        settings = self.settings
        return SparseGradConfig(
            basis=PlannedCores(plans),
            density=settings.density,
            support=settings.support,
            allocation=settings.allocation,
            refresh_steps=settings.refresh_steps,
            state_capacity=settings.state_capacity,
        )

    def optimizer(self, model: nn.Module, train: TrainSection) -> torch.optim.Optimizer:
        """Return that of ``train.optim``; for a changing support, AdamW on chosen entries of S."""
        chosen = selections(model)
        for layer in self._layers.values():
            if _ADAPTER in layer.chosen_parameters:
                # The first choice is optimizer state from the first step on; a second reference
                # would keep it in memory when another choice takes its place.
                layer.chosen_parameters[_ADAPTER] = layer.chosen_parameters[_ADAPTER][0], None
        return selective_adamw(model, chosen, train) if chosen else make_optimizer(model, train)

    def support(self, target: Target) -> tuple[Tensor, tuple[int, int]] | None:
        """Return the static support and the shape of the core."""
        layer = self._layers[target.name]
        return (_support(layer), layer.core_shape(_ADAPTER)) if _is_static(layer) else None

    def current_name(self, name: str) -> str:
        """Return the model's name of a parameter that an adapter's file names ``X.values``.

        Checkpoints had these names too, before the core was a tuner of PEFT.
        """
        path, _, last = name.rpartition(".")
        if path in self._layers and last in ("values", "core"):
            return path + _VALUES
        if path in self._layers and last == "bias":
            return path + _BIAS
        return name

    def _file_name(self, name: str) -> str:
        """Return the name that an adapter's file has for a parameter of the model."""
        path, bias_of = name.removesuffix(_VALUES), name.removesuffix(_BIAS)
        if path in self._layers:
            return f"{path}.values" if _is_static(self._layers[path]) else f"{path}.core"
        if bias_of in self._layers and not is_quantized(self._layers[bias_of].base_layer):
            return f"{bias_of}.bias"
        return name

    def adapter_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Return values (or S), their positions, and what the scope opens."""
        tensors = {self._file_name(name): t for name, t in trainable_state(model).items()}
        for name, layer in self._layers.items():
            if _is_static(layer):
                tensors[f"{name}.support"] = _support(layer).cpu()
        return tensors

    def load_adapter(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Load by name, positions too: the adapter does not depend on how they were chosen."""
        positions = {n: t for n, t in tensors.items() if n.endswith(".support")}
        fixed = {name: layer for name, layer in self._layers.items() if _is_static(layer)}
        for name, layer in fixed.items():
            room = math.prod(layer.core_shape(_ADAPTER))
            values = layer.sparsegrad_values[_ADAPTER]
            check_positions(name, positions[f"{name}.support"], values, room)
        others = {self.current_name(n): t for n, t in tensors.items() if n not in positions}
        load_by_name(model, others)
        for name, layer in fixed.items():
            _support(layer).copy_(positions[f"{name}.support"])

    def merged_OI(self, model: nn.Module, target: Target) -> Tensor:
        """Return W + Q_out S Q_in'."""
        layer = self._layers[target.name]
        weight_OI = target.weight_OI(model).detach().double()
        core_RS, q_out_OR, q_in_IS = _core_and_bases(layer)
        return effective_weight(weight_OI, core_RS, q_out_OR, q_in_IS)

    def factors(self, model: nn.Module, target: Target) -> Factors | None:
        """Return B = Q_out L and A = M Q_in', where S = L M has the term rank of S's support.

        For a static support that is the rank of almost every S that it allows, and below r.
        """
        layer = self._layers[target.name]
        core_RS, q_out_OR, q_in_IS = _core_and_bases(layer)
        if _is_static(layer):
            pattern = torch.zeros(core_RS.numel(), dtype=torch.bool)
            pattern[_support(layer).long().cpu()] = True
            pattern_RS = pattern.view(core_RS.shape)
        else:
            pattern_RS = core_RS != 0
        left_RK, right_KS = structural_factors(core_RS, pattern_RS)
        # (out, r_out) @ (r_out, k) and (k, r_in) @ (r_in, in)
        b_OK, a_KI = q_out_OR @ left_RK, right_KS @ q_in_IS.T
        return Factors(b_OK, a_KI, b_OK.shape[1])


def _with_cores(model: nn.Module, config: SparseGradConfig) -> dict[str, SparseGradLayer]:
    """Put the planned cores into a model as PEFT does, and return the layers by name."""
    assert config.basis is not None
    names = list(config.basis.by_target())
    # The targets go in as the keys of a state dict, which peft takes as exact module names.
    keys = {f"{name}.{SparseGradModel.prefix}": torch.empty(0) for name in names}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "While injecting the PEFT adapters", RuntimeWarning)
        inject_adapter_in_model(config, model, _ADAPTER, state_dict=keys)
    config.basis = None  # Its tensors live in the layers.
    check_adapted(model, names, "choose other layers with targets.modules")
    return {name: _layer(model, name) for name in names}


def _layer(model: nn.Module, name: str) -> SparseGradLayer:
    layer = model.get_submodule(name)
    assert isinstance(layer, SparseGradLayer)
    return layer


def _is_static(layer: SparseGradLayer) -> bool:
    return _ADAPTER in layer.sparsegrad_support


def _support(layer: SparseGradLayer) -> Tensor:
    return layer.sparsegrad_support[_ADAPTER]


def _core_and_bases(layer: SparseGradLayer) -> tuple[Tensor, Tensor, Tensor]:
    """Return S, Q_out and Q_in in float64."""
    core_RS = layer.core_RS(_ADAPTER).detach().double()
    q_out_OR, q_in_IS = layer.sparsegrad_q_out[_ADAPTER], layer.sparsegrad_q_in[_ADAPTER]
    return core_RS, q_out_OR.double(), q_in_IS.double()
