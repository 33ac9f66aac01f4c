"""Every PEFT type as a method: PEFT's own layers in the targets, found by their full names."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

from sparsegrad_cli.errors import SparsegradError, UsageError
from sparsegrad_cli.methods.implementation import (
    Adapted,
    Factors,
    Method,
    load_by_name,
    trainable_state,
)
from sparsegrad_cli.methods.lora.method import keep_inputs_once
from sparsegrad_cli.methods.peft_folder import check_adapted
from sparsegrad_cli.methods.peft_types.config import first_sentence, make_config
from sparsegrad_cli.methods.peft_types.data_init import initialize_after, initialize_before
from sparsegrad_cli.methods.peft_types.settings import PeftSettings
from sparsegrad_cli.methods.peft_types.shira_masks import mask_function
from sparsegrad_cli.methods.peft_types.step_hooks import draw_in_every_step, make_optimizer
from sparsegrad_cli.models.precision import unfreeze_parameter
from sparsegrad_cli.models.targets import Target
from sparsegrad_cli.numerics.hosvd import Basis
from sparsegrad_cli.recipe.schema import TrainSection

_NAME = "default"  # PEFT's name of the only adapter
_KEPT, _INITIAL = "kept/", "initial/"
_NEAR = 1e-2  # of the largest weight: rounding in half precision, but no other formula
_MISFITS = (TypeError, ValueError, NotImplementedError, AttributeError, RuntimeError)


class PeftTuner(Method):
    """See :class:`sparsegrad_cli.methods.implementation.Method`."""

    settings: PeftSettings

    def __init__(self, settings: PeftSettings) -> None:
        super().__init__(settings)
        self.targets: list[Target] = []
        self.config: Any = None
        self._initial: dict[str, tuple[Tensor, Tensor]] = {}

    # --- prepare

    def adapt(
        self,
        model: nn.Module,
        targets: list[Target],
        bases: Mapping[str, Basis],
        scores: Mapping[str, Tensor],
    ) -> Adapted:
        """Put PEFT's layers into the targets."""
        settings = self.settings.solved(targets)
        steps = None if self.training is None else self.training.steps
        self.targets = targets
        self.config = make_config(settings, targets, steps=steps)
        if settings.type == "SHIRA" and self.config.mask_type != "random":
            self.config.mask_fn = mask_function(
                self.config.mask_type, model, targets, self.training
            )
        elif self.training is None and settings.reads_batches:
            self.config.init_lora_weights = True  # load_adapter fills in what data would give
        moves = settings.type == "LORA" and self._moves_weights()
        before = {t.name: _weight(model, t).detach().clone() for t in targets if moves}
        self._put_in(model)
        fix = "choose other layers with targets.modules, or another type"
        check_adapted(model, (target.name for target in targets), fix)
        if moves:
            self._keep_initial(model, before)
        if self._is_plain_lora(model):
            keep_inputs_once(model)
        draw_in_every_step(model)
        entries = dict.fromkeys((target.name for target in targets), 0)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and (owner := _owner(name, entries)) is not None:
                unfreeze_parameter(parameter)
                entries[owner] += parameter.numel()
        requested = None
        if settings is not self.settings:
            requested = self.settings.requested(targets)
        frozen = [tensor for target in targets for tensor in _frozen_beside(model, target)]
        return Adapted(entries, requested, settings.size_text(), frozen=frozen)

    def _put_in(self, model: nn.Module) -> None:
        """Let PEFT replace the targets.

        Raises:
            SparsegradError: the type does not take these layers.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fan_in_fan_out, names of the model, save_projection
            try:
                initialize_before(model, self.config, self.training)
                wrapped = get_peft_model(model, self.config)
                initialize_after(wrapped, self.config, self.training)
            except _MISFITS as error:
                raise SparsegradError(
                    f"PEFT's {self.settings.type} does not take these target modules: "
                    f"{first_sentence(error)}",
                    where="method.type",
                    fix="choose other layers with targets.modules, or another type",
                ) from error

    def _moves_weights(self) -> bool:
        """Return whether LoRA's initialization subtracts its product from the weights."""
        init = self.config.init_lora_weights
        kept = ("gaussian", "orthogonal", "eva", "mica")  # B A is zero at the start
        return isinstance(init, str) and init not in kept

    def _is_plain_lora(self, model: nn.Module) -> bool:
        if self.settings.type != "LORA" or self.config.lora_bias:
            return False
        layers: list[Any] = [model.get_submodule(target.name) for target in self.targets]
        return not any(layer.lora_variant for layer in layers)

    def _keep_initial(self, model: nn.Module, before: Mapping[str, Tensor]) -> None:
        """Keep the first A and B, and subtract their product from the weights.

        PEFT has done the same; done here again, the weights follow from the first A and B bit for
        bit, so that an adapter that holds them restores the weights.
        """
        for target in self.targets:
            layer: Any = model.get_submodule(target.name)
            a = layer.lora_A[_NAME].weight.detach().cpu().clone()
            b = layer.lora_B[_NAME].weight.detach().cpu().clone()
            self._initial[target.name] = (a, b)
            moved = layer.get_base_layer().weight.detach()
            fits = a.shape[1] == target.in_features
            if fits:
                self._subtract(model, target, before[target.name])
                apart = (layer.get_base_layer().weight.detach() - moved).abs().max()
                fits = bool(apart <= _NEAR * before[target.name].abs().max())
            if not fits:
                raise SparsegradError(
                    f"PEFT's initialization {self.config.init_lora_weights} moves the weight of "
                    f"{target.name} by something else than the product of A and B",
                    where="method.init_lora_weights",
                    fix="use another initialization, such as pissa",
                )

    def _subtract(self, model: nn.Module, target: Target, weight: Tensor) -> None:
        """Set a target's weight to ``weight`` without the first change; both as its module holds
        them."""
        layer: Any = model.get_submodule(target.name)
        product_OI = self._first_product_OI(target, layer).to(weight.device)
        product = product_OI.T if target.transposed else product_OI
        layer.get_base_layer().weight.data = (weight.float() - product).to(weight.dtype)

    def _first_product_OI(self, target: Target, layer: Any) -> Tensor:
        """Return s B A of the start in float32, (out, in)."""
        a, b = self._initial[target.name]
        scaling: float = layer.scaling[_NAME]
        return scaling * (b.float() @ a.float())  # (out, r) @ (r, in)

    def optimizer(self, model: nn.Module, train: TrainSection) -> torch.optim.Optimizer:
        """Return AdamW, with what the type does in every step."""
        return make_optimizer(model, self.config, train)

    # --- save and load

    def adapter_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Return what trains, and what loading could not compute again for certain."""
        tensors = trainable_state(model)
        tensors |= {_KEPT + name: tensor.detach().cpu() for name, tensor in self._kept(model)}
        for name, (a, b) in self._initial_or_zero(model):
            tensors |= {f"{_INITIAL}{name}.lora_A": a, f"{_INITIAL}{name}.lora_B": b}
        return tensors

    def _kept(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Yield the frozen tensors of the layers that the adapter holds, by name."""
        for target in self.targets:
            layer: Any = model.get_submodule(target.name)
            for attribute in self.settings.tuner.saved:
                yield f"{target.name}.{attribute}", getattr(layer, attribute)[_NAME]
            if self.settings.type == "LORA" and self.config.init_lora_weights == "mica":
                yield f"{target.name}.lora_B", layer.lora_B[_NAME].weight

    def _initial_or_zero(self, model: nn.Module) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
        """Yield the first A and B; those of a model without data for them are zeros."""
        if self._initial:
            yield from self._initial.items()
        elif self.settings.keys.get("init_lora_weights") in ("corda", "lora_ga"):
            for target in self.targets:
                layer: Any = model.get_submodule(target.name)
                a, b = layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight
                yield target.name, (torch.zeros_like(a).cpu(), torch.zeros_like(b).cpu())

    def load_adapter(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Load the trained parameters by name, and restore what the initialization computed."""
        found = dict(self._kept(model))
        own = {n.removeprefix(_KEPT): t for n, t in tensors.items() if n.startswith(_KEPT)}
        for name, tensor in own.items():
            if name not in found or found[name].shape != tensor.shape:
                raise KeyError(name)
        plain = {n: t for n, t in tensors.items() if not n.startswith((_KEPT, _INITIAL))}
        first = self._loaded_initial(tensors)
        load_by_name(model, plain)
        with torch.no_grad():
            for name, tensor in own.items():
                found[name].copy_(tensor)
            self._replace_initial(model, first)

    def _loaded_initial(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        if not any(name.startswith(_INITIAL) for name in tensors):
            return {}
        names = {t.name: [f"{_INITIAL}{t.name}.lora_{part}" for part in "AB"] for t in self.targets}
        return {name: (tensors[a], tensors[b]) for name, (a, b) in names.items()}

    def _replace_initial(
        self, model: nn.Module, first: Mapping[str, tuple[Tensor, Tensor]]
    ) -> None:
        """Subtract the first product of the run in place of that of this preparation."""
        for target in self.targets:
            if target.name not in first:
                continue
            held = self._initial.get(target.name)
            new = first[target.name]
            if held is not None and all(torch.equal(x, y) for x, y in zip(held, new, strict=True)):
                continue
            layer: Any = model.get_submodule(target.name)
            weight = layer.get_base_layer().weight.detach()
            if held is not None:
                product_OI = self._first_product_OI(target, layer).to(weight.device)
                product = product_OI.T if target.transposed else product_OI
                weight = (weight.float() + product).to(weight.dtype)
            self._initial[target.name] = new
            self._subtract(model, target, weight)

    # --- export

    def merged_OI(self, model: nn.Module, target: Target) -> Tensor:
        """Return the weight of PEFT's merged layer.

        Raises:
            UsageError: the type cannot be merged.
        """
        return self._merged(model, target)[0]

    def merged_bias(self, model: nn.Module, target: Target) -> Tensor | None:
        """Return the bias of PEFT's merged layer, where merging changes it."""
        layer: Any = model.get_submodule(target.name)
        bias = layer.get_base_layer().bias
        if bias is None:
            return None
        merged = self._merged(model, target)[1]
        return None if torch.equal(merged, bias.detach().double()) else merged

    def _merged(self, model: nn.Module, target: Target) -> tuple[Tensor, Any]:
        """Return weight (out, in) and bias of a merged copy of a layer, in float64."""
        refusal = self.settings.tuner.merge_refusal
        layer: Any = copy.deepcopy(model.get_submodule(target.name)).float()
        if not refusal:
            try:
                with torch.no_grad():
                    layer.merge()
            except (ValueError, RuntimeError, NotImplementedError) as error:
                refusal = first_sentence(error)
        if refusal:
            raise UsageError(
                f"{self.settings.type} cannot be merged into the weights: {refusal}",
                where="method.type",
                fix="`sparsegrad export --to adapter`",
            )
        base = layer.get_base_layer()
        weight = base.weight.detach().double()
        bias = None if base.bias is None else base.bias.detach().double()
        return (weight.T if target.transposed else weight), bias

    def factors(self, model: nn.Module, target: Target) -> Factors | None:
        """Return the change of plain LoRA layers; None for other types, and where a bias trains.

        An initialization that subtracts its product from the weights makes a change of rank 2r.
        """
        if not self._is_plain_lora(model):
            return None
        layer: Any = model.get_submodule(target.name)
        a, b = layer.lora_A[_NAME].weight.detach(), layer.lora_B[_NAME].weight.detach()
        scaling: float = layer.scaling[_NAME]
        if target.name in self._initial:
            first = [part.to(a) for part in self._initial[target.name]]
            a, b = torch.cat([a, first[0]]), torch.cat([b, -first[1]], dim=1)
        return Factors(b, a, scaling * a.shape[0])


def _owner(name: str, targets: Mapping[str, Any]) -> str | None:
    """Return the target that holds a parameter; None for those outside, such as the head's."""
    parts = name.split(".")
    above = (".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))
    return next((path for path in above if path in targets), None)


def _frozen_beside(model: nn.Module, target: Target) -> Iterator[Tensor]:
    """Yield the frozen tensors that PEFT's layer holds beside the weight and bias."""
    layer: Any = model.get_submodule(target.name)
    base = {id(tensor) for tensor in (*layer.get_base_layer().parameters(),)}
    for tensor in (*layer.parameters(), *layer.buffers()):
        if not tensor.requires_grad and id(tensor) not in base:
            yield tensor


def _weight(model: nn.Module, target: Target) -> Tensor:
    weight = model.get_submodule(target.name).weight
    assert isinstance(weight, Tensor)
    return weight
