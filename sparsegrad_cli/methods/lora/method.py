"""LoRA (Hu et al. 2021) by the peft library: W + (alpha / r) B A with B (out, r), A (r, in)."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad_cli.methods.implementation import Adapted, Factors, Method
from sparsegrad_cli.methods.lora.settings import LowRankSettings
from sparsegrad_cli.methods.peft_folder import check_adapted
from sparsegrad_cli.models.precision import unfreeze_parameter
from sparsegrad_cli.models.quantized import dequantized, is_quantized
from sparsegrad_cli.models.targets import Target
from sparsegrad_cli.numerics.frozen_linear import adapter_linear
from sparsegrad_cli.numerics.hosvd import Basis


def keep_inputs_once(model: nn.Module) -> int:
    """Let LoRA layers save their input once, in its own dtype (:func:`adapter_linear`).

    Outputs and gradients are those of peft's layers, which save another copy of the input where the
    adapter's dtype differs from the model's, or where dropout acts on it.

    Args:
        model: a model with one plain LoRA adapter per layer.

    Returns:
        The number of layers.
    """
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        patched: Any = layer
        patched.forward = functools.partial(_lean_forward, layer, patched.forward)
    return len(layers)


def _lean_forward(layer: Any, plain: Callable[..., Tensor], x: Tensor, **more: Any) -> Tensor:
    """Return (..., out) for x (..., in); all but the training of one adapter is left to peft."""
    # A compiler chooses itself what to save.
    compiling = torch.compiler.is_compiling()
    if more or layer.merged or layer.disable_adapters or compiling or not torch.is_grad_enabled():
        return plain(x, **more)
    (name,) = layer.active_adapters
    dropout, base = layer.lora_dropout[name], layer.base_layer
    packed = is_quantized(base)
    weight = None if packed else base.weight.T if layer.fan_in_fan_out else base.weight
    return adapter_linear(
        x,
        weight,
        None if packed else base.bias,
        layer.lora_A[name].weight,
        layer.lora_B[name].weight,
        scaling=layer.scaling[name],
        dropout=dropout.p if layer.training and isinstance(dropout, nn.Dropout) else 0.0,
        product=base if packed else None,
        unpacked=functools.partial(dequantized, base) if packed else None,
    )


def lora_factors(model: nn.Module, target: Target) -> tuple[nn.Parameter, nn.Parameter, float]:
    """Return A (r, in), B (out, r) and the scale s of a target that has a LoRA adapter."""
    layer: Any = model.get_submodule(target.name)
    name = layer.active_adapters[0]
    return layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]


class Lora(Method):
    """See :class:`sparsegrad_cli.methods.implementation.Method`."""

    settings: LowRankSettings

    def adapt(
        self,
        model: nn.Module,
        targets: list[Target],
        bases: Mapping[str, Basis],
        scores: Mapping[str, Tensor],
    ) -> Adapted:
        """Put peft's adapters into the targets. B starts at zero, so the function is unchanged."""
        from peft import LoraConfig, inject_adapter_in_model

        self.targets = targets
        rank, requested = self.settings.size_on(targets), self.settings.requested(targets)
        config = LoraConfig(
            r=rank,
            **self.settings.lora_options(rank),
            target_modules=[],
            fan_in_fan_out=any(target.transposed for target in targets),
        )
        # The targets go in as the keys of a state dict, which peft takes as exact module names.
        # Names in target_modules are rewritten for mixture-of-experts models (peft 0.21.2 turns
        # mlp.up_proj into the experts' gate_up_proj).
        keys = {f"{target.name}.lora_A.weight": torch.empty(0) for target in targets}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "While injecting the PEFT adapters", RuntimeWarning)
            inject_adapter_in_model(config, model, state_dict=keys)
        self.peft_config = config
        fix = "choose other layers with targets.modules, or use method sparsegrad"
        check_adapted(model, (target.name for target in targets), fix)
        if not config.use_dora:
            keep_inputs_once(model)
        entries = dict.fromkeys((target.name for target in targets), 0)
        for target in targets:
            for name, parameter in model.get_submodule(target.name).named_parameters():
                if "lora_" in name:
                    # peft makes A and B in the weights' dtype, where small increments are lost.
                    unfreeze_parameter(parameter)
                    entries[target.name] += parameter.numel()
        return Adapted(entries, requested, f"rank {rank}")

    def merged_OI(self, model: nn.Module, target: Target) -> Tensor:
        """Return W plus what peft itself would merge into it."""
        layer: Any = model.get_submodule(target.name)
        delta: Tensor = layer.get_delta_weight(layer.active_adapters[0]).detach()
        delta_OI = delta.T if target.transposed else delta
        return target.weight_OI(model).detach().double() + delta_OI.double()

    def factors(self, model: nn.Module, target: Target) -> Factors | None:
        """Return B and A as they are, with alpha."""
        layer: Any = model.get_submodule(target.name)
        name = layer.active_adapters[0]
        return Factors(
            layer.lora_B[name].weight.detach(),
            layer.lora_A[name].weight.detach(),
            layer.lora_alpha[name],
            layer.use_rslora[name],
        )
