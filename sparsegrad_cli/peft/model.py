"""The tuner: puts cores into a model, saves and loads them, and combines adapters.

The methods with a leading underscore are the ones by which PEFT's ``BaseTuner`` asks its subclasses
to be extended; :mod:`sparsegrad_cli.peft.registration` names the versions that were checked.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparsegrad_cli.models.digests import fingerprint
from sparsegrad_cli.models.quantized import dtype_of, record_dtype
from sparsegrad_cli.models.targets import Target, is_linear, linear_shape
from sparsegrad_cli.numerics.hosvd import Basis, by_columns, map_bases, truncated
from sparsegrad_cli.numerics.sizing import count_for_density, rank_for_counts
from sparsegrad_cli.peft.config import SparseGradConfig
from sparsegrad_cli.peft.layer import SparseGradLayer
from sparsegrad_cli.peft.plan import CorePlan, PlannedCores, plan_cores

_Q_OUT, _Q_IN = "sparsegrad_q_out", "sparsegrad_q_in"
_PREFIX = "base_model.model."


class SparseGradModel(BaseTuner):
    """A model whose linear layers hold SparseGrad cores. Made by ``peft.get_peft_model``.

    Raises:
        ValueError: The configuration has neither a basis nor layers, the basis does not cover a
            target module, or no module matches.
    """

    prefix = "sparsegrad_"
    tuner_layer_cls = SparseGradLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _prepare_adapter_config(
        self, peft_config: SparseGradConfig, model_config: dict[str, Any]
    ) -> SparseGradConfig:
        """Take the target modules from the basis, or from the saved layers."""
        if peft_config.basis is None and not peft_config.layers:
            raise ValueError(
                "SparseGradConfig needs a basis: "
                "SparseGradConfig(basis=sparsegrad_cli.calibrate(model, batches), ...), or "
                "basis=sparsegrad_cli.load_basis(path)"
            )
        if peft_config.target_modules is None:
            basis = peft_config.basis
            names = peft_config.layers if basis is None else basis.by_target()
            peft_config.target_modules = set(names)  # type: ignore[assignment]
        return peft_config

    def _prepare_model(self, peft_config: SparseGradConfig, model: nn.Module) -> None:
        """Plan the cores of all target modules together, before the first one is replaced."""
        record_dtype(model)
        layers = dict(self._targets(peft_config, model))
        if not layers:
            raise ValueError(_nothing_matches(peft_config))
        if peft_config.basis is None:
            self._plans = _saved_plans(peft_config, layers)
            return
        _warn_of_other_weights(peft_config.basis, model)
        self._plans = _new_plans(peft_config, layers)
        peft_config.layers = {
            name: [plan.basis.q_out.shape[1], plan.basis.q_in.shape[1], plan.count]
            for name, plan in self._plans.items()
        }
        first: dict[int, str] = {}
        for name, plan in self._plans.items():
            first.setdefault(id(plan.basis), name)
        peft_config.shared_bases = {
            name: first[id(plan.basis)]
            for name, plan in self._plans.items()
            if first[id(plan.basis)] != name
        }

    def _targets(
        self, peft_config: SparseGradConfig, model: nn.Module
    ) -> Iterator[tuple[str, nn.Module]]:
        """Yield the names and plain layers of the target modules."""
        inside: tuple[str, ...] = ()
        for name, module in model.named_modules():
            if name.startswith(inside) and inside:
                continue
            if isinstance(module, BaseTunerLayer):
                inside = (*inside, f"{name}.")
                module = module.get_base_layer()
            if is_linear(module) and self._check_target_module_exists(peft_config, name):
                yield name, module

    def _create_and_replace(
        self,
        peft_config: SparseGradConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        """Put a core into one target module."""
        # Not kept: a plan holds tensors that would stay on their device if the model moves.
        plan = self._plans.pop(current_key, None)
        if plan is None:
            raise ValueError(f"SparseGrad adapts linear layers: {current_key} is not one")
        layer = target
        if not isinstance(target, SparseGradLayer):
            layer = SparseGradLayer(target)
        assert isinstance(layer, SparseGradLayer)
        layer.add_adapter(
            adapter_name,
            plan,
            static=peft_config.support == "static",
            chosen_by_optimizer=peft_config.chosen_by_optimizer,
        )
        layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)
        if adapter_name not in self.active_adapters:
            layer.sparsegrad_values[adapter_name].requires_grad_(False)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: SparseGradConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """Return the adapter's tensors; bases that layers share once."""
        found: dict[str, Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        for name in config.shared_bases:
            for part in (_Q_OUT, _Q_IN):
                for prefix in ("", _PREFIX):
                    found.pop(f"{prefix}{name}.{part}.{adapter_name}", None)
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: SparseGradConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """Give every layer the bases that it shares, under the names that the model has."""
        _check_tensors(config, state_dict)
        # In the memory layout of new bases: products of another layout differ in the last bits.
        whole = {
            name: by_columns(tensor) if name.endswith((_Q_OUT, _Q_IN)) else tensor
            for name, tensor in state_dict.items()
        }
        for name, first in config.shared_bases.items():
            for part in (_Q_OUT, _Q_IN):
                for prefix in ("", _PREFIX):
                    if f"{prefix}{first}.{part}" in whole:
                        whole[f"{prefix}{name}.{part}"] = whole[f"{prefix}{first}.{part}"]
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, whole
        )
        return remapped

    def add_weighted_adapter(
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str
    ) -> None:
        """Make a new adapter whose change of every weight is the weighted sum of others'.

        The sum is exact: adapters with equal bases add their cores; otherwise the bases are put
        side by side, so the rank is the sum of the ranks. The new adapter has a static support: all
        parameters that are part of a support of the others.

        Args:
            adapters: Names of the adapters.
            weights: Their weights.
            adapter_name: Name of the new adapter, which does not become active.

        Raises:
            ValueError: A name is unknown or taken, the numbers of names and weights differ, a
                weight is not finite, or the adapters train further modules, such as a classifier.
        """
        if not adapters:
            raise ValueError("expected names of adapters, got none")
        unknown = [name for name in adapters if name not in self.peft_config]
        if unknown:
            raise ValueError(f"unknown adapters {unknown}: there is {', '.join(self.peft_config)}")
        if adapter_name in self.peft_config:
            raise ValueError(f"there is an adapter {adapter_name!r} already: choose another name")
        if len(adapters) != len(weights):
            raise ValueError(f"expected {len(adapters)} weights, one each, got {len(weights)}")
        if not all(math.isfinite(weight) for weight in weights):
            raise ValueError(f"weights are {list(weights)}: expected finite numbers")
        for path, wrapper in self.model.named_modules():
            saved = isinstance(wrapper, ModulesToSaveWrapper) and wrapper.modules_to_save
            if saved and any(adapter in saved for adapter in adapters):
                raise ValueError(
                    f"the adapters train {path} besides (modules_to_save), which cannot be "
                    "added: combine adapters without it, and copy the module that you want"
                )
        config = copy.copy(self.peft_config[adapters[0]])
        config.basis, config.layers, config.shared_bases = None, {}, {}
        config.support, config.refresh_steps, config.state_capacity = "static", None, None
        names = set()
        for name, layer in self._layers():
            held = [a for a in adapters if a in layer.sparsegrad_values]
            if not held:
                continue
            names.add(name)
            plan, values = _combined(layer, held, [weights[adapters.index(a)] for a in held])
            layer.add_adapter(adapter_name, plan, static=True, chosen_by_optimizer=False)
            with torch.no_grad():
                layer.sparsegrad_values[adapter_name].copy_(values)
            layer.sparsegrad_values[adapter_name].requires_grad_(False)
            rows, columns = layer.core_shape(adapter_name)
            config.layers[name] = [rows, columns, plan.count]
        config.target_modules = names
        self.peft_config[adapter_name] = config

    def _layers(self) -> Iterator[tuple[str, SparseGradLayer]]:
        for name, module in self.model.named_modules():
            if isinstance(module, SparseGradLayer):
                yield name, module


def _new_plans(config: SparseGradConfig, layers: dict[str, nn.Module]) -> dict[str, CorePlan]:
    assert config.basis is not None
    if isinstance(config.basis, PlannedCores):
        return dict(config.basis.plans)
    given = config.basis.by_target()
    missing = [name for name in layers if name not in given]
    if missing:
        raise ValueError(
            f"the basis covers {len(given)} modules and not {missing[0]}: calibrate with the same "
            "target_modules, or leave target_modules out"
        )
    shapes = {name: linear_shape(layer) for name, layer in layers.items()}
    for name, shape in shapes.items():
        of_basis = (given[name].q_out.shape[0], given[name].q_in.shape[0])
        if of_basis != shape:
            raise ValueError(
                f"expected a basis for {name} of shape {shape}, got one for {of_basis}"
            )
    dense = config.support == "dense"
    counts = {
        # Without a density, the rank says how large a dense core is.
        name: 0 if config.density is None else count_for_density(config.density, *shape)
        for name, shape in shapes.items()
    }
    rank = config.rank or rank_for_counts(counts.values(), dense=dense)
    if not dense:
        _warn_of_small_cores(config, shapes, counts, rank)

    needed = min(rank, max(max(shape) for shape in shapes.values()))
    for name, shape in shapes.items():
        sides = (given[name].q_out.shape[1], given[name].q_in.shape[1])
        if any(has < min(rank, side) for has, side in zip(sides, shape, strict=True)):
            raise ValueError(
                f"the basis of {name} holds {min(sides)} directions and the core needs {needed}: "
                f"calibrate with rank={needed}, or with the density of the configuration"
            )

    def fit(name: str, basis: Basis) -> Basis:
        # In the dtype in which the products are made: half the bytes for half precision.
        layer = layers[name]
        return truncated(basis, rank).to(dtype_of(layer), next(layer.parameters()).device)

    bases = map_bases({name: given[name] for name in layers}, fit)
    return plan_cores(
        bases, config.basis.scores, counts, support=config.support, allocation=config.allocation
    )


def _nothing_matches(config: SparseGradConfig) -> str:
    known = list(config.layers if config.basis is None else config.basis.by_target())
    shown = ", ".join(known[:5]) + (f" and {len(known) - 5} more" if len(known) > 5 else "")
    asked = " without ".join(
        f"{name}={value if isinstance(value, str) else sorted(value)!r}"
        for name in ("target_modules", "exclude_modules")
        if (value := getattr(config, name))
    )
    return (
        f"SparseGradConfig: {asked} leaves no linear layer of the model to adapt: the basis covers "
        f"{shown}"
    )


def _warn_of_other_weights(basis: Any, model: nn.Module) -> None:
    """Warn if a basis that says what it was computed on was not computed on this model."""
    metadata = getattr(basis, "metadata", None)
    if metadata is None:
        return
    targets: list[Target] = []
    for name in metadata.targets:
        try:
            layer = model.get_submodule(name)
        except AttributeError:
            layer = None
        if isinstance(layer, BaseTunerLayer):
            return  # Another adapter is in the model: it was compared when that one was added.
        if layer is None or not is_linear(layer):
            targets = []
            break
        targets.append(Target(name, "", 0, *linear_shape(layer), isinstance(layer, Conv1D)))
    if not targets or fingerprint(model, targets) != metadata.fingerprint:
        warnings.warn(
            "SparseGradConfig: the basis was computed on a model with other weights or layers, so "
            "its directions may not fit this one: calibrate this model",
            stacklevel=2,
        )


def _warn_of_small_cores(
    config: SparseGradConfig,
    shapes: dict[str, tuple[int, int]],
    counts: dict[str, int],
    rank: int,
) -> None:
    """Warn if the cores have fewer parameters than the density asks for."""
    rooms = {name: min(rank, out) * min(rank, into) for name, (out, into) in shapes.items()}
    trained = sum(min(count, rooms[name]) for name, count in counts.items())
    if trained < (asked := sum(counts.values())):
        warnings.warn(
            f"SparseGradConfig: density={config.density:g} asks for {asked:,} parameters in "
            f"{len(counts)} target modules, but cores of rank {rank} train {trained:,}: raise "
            "rank, or lower density",
            stacklevel=2,
        )


def _saved_plans(config: SparseGradConfig, layers: dict[str, nn.Module]) -> dict[str, CorePlan]:
    """Return cores of the saved sizes, whose tensors are filled from the adapter's file."""
    plans, shared = {}, {}
    lacking = [name for name in config.layers if name not in layers]
    if lacking:
        raise ValueError(
            f"the saved adapter has cores for {len(lacking)} modules that are not in the model or "
            f"not adapted, such as {lacking[0]}: load it into the model that it was trained on"
        )
    for name, layer in layers.items():
        if name not in config.layers:
            raise ValueError(f"the saved adapter has no core for {name}")
        rows, columns, count = config.layers[name]
        first = config.shared_bases.get(name, name)
        device, dtype = next(layer.parameters()).device, dtype_of(layer)
        if first not in shared:
            out_features, in_features = linear_shape(layer)
            q_out = by_columns(torch.zeros(out_features, rows, device=device, dtype=dtype))
            q_in = by_columns(torch.zeros(in_features, columns, device=device, dtype=dtype))
            shared[first] = Basis(q_out, q_in, q_out.new_zeros(rows), q_in.new_zeros(columns))
        positions = torch.zeros(count, dtype=torch.int32) if config.support == "static" else None
        plans[name] = CorePlan(shared[first], count, positions)
    return plans


def _check_tensors(config: SparseGradConfig, state_dict: dict[str, Tensor]) -> None:
    """Check that the tensors of a file are those of the saved sizes and support."""
    given = {name.removeprefix(_PREFIX): tensor for name, tensor in state_dict.items()}
    static = config.support == "static"
    for name, (rows, columns, count) in config.layers.items():
        values = given.get(f"{name}.sparsegrad_values")
        if values is None:
            continue  # PEFT reports tensors that are missing.
        wanted = (count,) if static else (rows, columns)
        q_out, q_in = (
            given.get(f"{config.shared_bases.get(name, name)}.{part}") for part in (_Q_OUT, _Q_IN)
        )
        problem = ""
        support = given.get(f"{name}.sparsegrad_support")
        if tuple(values.shape) != wanted:
            problem = f"values of the shape {tuple(values.shape)}, expected {wanted}"
        elif static != (f"{name}.sparsegrad_support" in given):
            problem = "no static support" if static else "a static support"
        elif q_out is None or q_in is None:
            problem = "no bases, and shared_bases does not say whose it shares"
        elif (q_out.shape[1], q_in.shape[1]) != (rows, columns):
            got = f"{q_out.shape[1]} x {q_in.shape[1]}"
            problem = f"bases for a core of {got}, expected {rows} x {columns}"
        elif support is not None and bool(((support < 0) | (support >= rows * columns)).any()):
            problem = "positions outside the core"
        if problem:
            raise ValueError(
                f"adapter_config.json does not fit the adapter's file: with support="
                f"{config.support!r} and layers={[rows, columns, count]}, the file has for {name} "
                f"{problem}: restore the saved adapter_config.json"
            )


def _combined(
    layer: SparseGradLayer, adapters: list[str], weights: list[float]
) -> tuple[CorePlan, Tensor]:
    """Return the core of a weighted sum of adapters, and its values."""
    q_outs = [layer.sparsegrad_q_out[name] for name in adapters]
    q_ins = [layer.sparsegrad_q_in[name] for name in adapters]
    cores = [w * layer.core_RS(n).detach() for n, w in zip(adapters, weights, strict=True)]
    patterns = [_pattern(layer, name) for name in adapters]
    same = all(_equal(q, q_outs[0]) for q in q_outs) and all(_equal(q, q_ins[0]) for q in q_ins)
    if same:
        q_out, q_in = q_outs[0], q_ins[0]
        core_RS = torch.stack(cores).sum(0)
        pattern_RS = torch.stack(patterns).any(0)
    else:
        q_out, q_in = torch.cat(q_outs, 1), torch.cat(q_ins, 1)
        core_RS, pattern_RS = torch.block_diag(*cores), torch.block_diag(*patterns).bool()
    positions = torch.nonzero(pattern_RS.reshape(-1)).squeeze(1)
    basis = Basis(q_out, q_in, q_out.new_zeros(q_out.shape[1]), q_in.new_zeros(q_in.shape[1]))
    plan = CorePlan(basis, len(positions), positions)
    return plan, core_RS.reshape(-1)[positions]


def _pattern(layer: SparseGradLayer, name: str) -> Tensor:
    """Return which parameters of S an adapter trains, (r_out, r_in) bool."""
    shape = layer.core_shape(name)
    if name not in layer.sparsegrad_support:
        return torch.ones(shape, dtype=torch.bool, device=layer.sparsegrad_q_out[name].device)
    flat = torch.zeros(
        shape[0] * shape[1], dtype=torch.bool, device=layer.sparsegrad_support[name].device
    )
    flat[layer.sparsegrad_support[name].long()] = True
    return flat.view(shape)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and bool(torch.equal(a, b)))
