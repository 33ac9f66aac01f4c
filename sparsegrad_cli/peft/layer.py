"""A linear layer with SparseGrad cores beside its frozen weight: W + Q_out S Q_in'."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from sparsegrad_cli.models.quantized import is_quantized
from sparsegrad_cli.models.targets import linear_shape
from sparsegrad_cli.numerics.core_linear import core_linear
from sparsegrad_cli.numerics.frozen_linear import core_beside
from sparsegrad_cli.peft.plan import CorePlan


class AdapterBuffers(nn.Module):
    """Buffers by adapter name, saved with the adapter.

    PEFT's own container would be cast to float32 with the trainable parameters; bases keep the
    dtype of the products that they are part of.
    """

    def __getitem__(self, name: str) -> Tensor:
        return self.get_buffer(name)

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self.register_buffer(name, tensor)

    def __delitem__(self, name: str) -> None:
        delattr(self, name)

    def __contains__(self, name: object) -> bool:
        return name in self._buffers

    def keys(self) -> list[str]:
        """Return the names of the adapters."""
        return list(self._buffers)


class SparseGradLayer(nn.Module, BaseTunerLayer):
    """A frozen linear layer with one trainable core per adapter (Chekalina et al. 2024, section 3).

    Args:
        base_layer: nn.Linear, transformers' Conv1D or a linear layer of bitsandbytes.

    Attributes:
        sparsegrad_values: Adapter -> (k,) trained values of S, for a static support; else S,
            (r_out, r_in). float32 or wider.
        sparsegrad_support: Adapter -> (k,) int32 flat positions of the values in S; only for a
            static support.
        sparsegrad_q_out: Adapter -> (out, r_out).
        sparsegrad_q_in: Adapter -> (in, r_in).
        chosen_parameters: Adapter -> number of parameters that a step changes, and the first choice
            if there is one; only where the optimizer chooses.

    Raises:
        TypeError: The module is not a linear layer.
    """

    # What BaseTunerLayer brings, which mypy does not read.
    base_layer: nn.Module
    active_adapters: list[str]
    get_base_weight: Callable[[], Tensor]
    set_base_weight: Callable[[Tensor], None]
    set_adapter: Callable[..., None]

    adapter_layer_names = ("sparsegrad_values",)
    other_param_names = (
        "sparsegrad_support",
        "sparsegrad_q_out",
        "sparsegrad_q_in",
        "chosen_parameters",
        "needs_optimizer",
        "unused_gradient",
    )

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        if not isinstance(base_layer, nn.Linear | Conv1D):
            raise TypeError(
                f"SparseGrad adapts linear layers, and {type(base_layer).__name__} is not one"
            )
        self.base_layer = base_layer
        self.out_features, self.in_features = linear_shape(base_layer)
        self.transposed = isinstance(base_layer, Conv1D)
        self.quantization_backend = resolve_quantization_backend(base_layer)
        self.sparsegrad_values = nn.ParameterDict()
        self.sparsegrad_support = AdapterBuffers()
        self.sparsegrad_q_out = AdapterBuffers()
        self.sparsegrad_q_in = AdapterBuffers()
        self.chosen_parameters: dict[str, tuple[int, Tensor | None]] = {}
        self.needs_optimizer: dict[str, bool] = {}
        self.unused_gradient: dict[str, Tensor | None] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter: str | list[str] = []

    def add_adapter(
        self, name: str, plan: CorePlan, *, static: bool, chosen_by_optimizer: bool
    ) -> None:
        """Put a core beside the weight. S is zero, so the output does not change.

        Args:
            name: The adapter's name.
            plan: Its basis and support.
            static: Whether the parameter holds the values of the support alone.
            chosen_by_optimizer: Whether the optimizer chooses the parameters that a step changes.
        """
        device = plan.basis.q_out.device
        # The core is float32 or wider whatever the weight is: small increments must not be lost.
        dtype = torch.promote_types(plan.basis.q_out.dtype, torch.float32)
        self.sparsegrad_q_out[name] = plan.basis.q_out
        self.sparsegrad_q_in[name] = plan.basis.q_in
        if static:
            assert plan.positions is not None
            self.sparsegrad_support[name] = plan.positions.to(device, torch.int32)
            zeros = torch.zeros(plan.count, dtype=dtype, device=device)
        else:
            zeros = torch.zeros(self.core_shape(name), dtype=dtype, device=device)
        self.sparsegrad_values[name] = nn.Parameter(zeros)
        if chosen_by_optimizer:
            self.chosen_parameters[name] = plan.count, plan.positions
            self.needs_optimizer[name] = True

    def chosen_by_optimizer(self, name: str) -> bool:
        """Return whether the optimizer chooses the parameters that a step changes."""
        return name in self.chosen_parameters

    def watch_optimizer(self, name: str, optimizer: torch.optim.Optimizer) -> None:
        """Notice in later forward passes if another optimizer changes the values of an adapter.

        Between the moment when a gradient arrives and the next step of ``optimizer``, nothing else
        may change the values. They stay the same while gradients accumulate, and where a gradient
        scaler leaves out a step.

        Args:
            name: The adapter's name.
            optimizer: The optimizer that chooses the parameters of its core.
        """
        parameter: Tensor = self.sparsegrad_values[name]
        if name not in self.unused_gradient:
            parameter.register_post_accumulate_grad_hook(lambda p: self._gradient_arrived(name, p))
        self.unused_gradient[name] = None
        optimizer.register_step_post_hook(lambda *_: self._gradient_used(name))

    def _gradient_arrived(self, name: str, values: Tensor) -> None:
        if name in self.unused_gradient and self.unused_gradient[name] is None:
            self.unused_gradient[name] = values.detach().abs().sum()

    def _gradient_used(self, name: str) -> None:
        if name in self.unused_gradient:
            self.unused_gradient[name] = None

    def core_shape(self, name: str) -> tuple[int, int]:
        """Return (r_out, r_in) of an adapter."""
        return self.sparsegrad_q_out[name].shape[1], self.sparsegrad_q_in[name].shape[1]

    def core_RS(self, name: str) -> Tensor:
        """Return S of an adapter, (r_out, r_in)."""
        values: Tensor = self.sparsegrad_values[name]
        if name not in self.sparsegrad_support:
            return values
        rows, columns = self.core_shape(name)
        flat = values.new_zeros(rows * columns)
        return flat.index_put((self.sparsegrad_support[name],), values).view(rows, columns)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return Q_out S Q_in' in the layout and dtype of the base layer's weight.

        Args:
            adapter: The adapter's name.
        """
        q_out_OR, q_in_IS = self.sparsegrad_q_out[adapter], self.sparsegrad_q_in[adapter]
        core_RS = self.core_RS(adapter)
        wide = core_RS.dtype
        # (out, r_out) @ (r_out, r_in) @ (r_in, in)
        delta_OI = q_out_OR.to(wide) @ core_RS @ q_in_IS.to(wide).T
        return delta_OI.T if self.transposed else delta_OI

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return True: the change of the weight is a product of low rank."""
        return True

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the change of adapters to the weight. A weight of 8 or 4 bits is rounded to them.

        Args:
            safe_merge: Check the merged weight before it replaces the weight.
            adapter_names: The adapters; by default the active ones.

        Raises:
            ValueError: With ``safe_merge``, the merged weight is not finite.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.sparsegrad_values:
                continue
            if is_quantized(self.base_layer):
                warnings.warn(
                    "SparseGrad: the merged weight is rounded to the bits of the base layer, so "
                    "outputs change; merge into a model that is not quantized for the exact sum",
                    stacklevel=2,
                )
            weight = self.get_base_weight()
            delta = self.get_delta_weight(name).detach()
            merged = (weight.to(delta.dtype) + delta).to(weight.dtype)
            if safe_merge and not bool(torch.isfinite(merged).all()):
                raise ValueError(f"adapter {name}: the merged weight holds NaN or Inf")
            self.set_base_weight(merged)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Subtract the change of all merged adapters from the weight, up to rounding."""
        if not self.merged:
            warnings.warn("SparseGrad: no adapter is merged", stacklevel=2)
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            weight = self.get_base_weight()
            delta = self.get_delta_weight(name).detach()
            self.set_base_weight((weight.to(delta.dtype) - delta).to(weight.dtype))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return (..., out) for x (..., in).

        Raises:
            RuntimeError: A core whose parameters the optimizer chooses is trained without
                :func:`sparsegrad_cli.peft.optimizer`, or by another optimizer beside it.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [name for name in self.active_adapters if name in self.sparsegrad_values]
        if self.disable_adapters or self.merged or not names:
            plain: Tensor = self.base_layer(x, *args, **kwargs)
            return plain
        if self.training and torch.is_grad_enabled():
            self._check_optimizer(names)
        if args or kwargs or _has_hooks(self.base_layer):
            y: Tensor = self.base_layer(x, *args, **kwargs)
        else:
            y = self._with_core(x, names.pop(0))
        for name in names:
            y = y + self._core_output(x, name).to(y.dtype)
        return y

    def _with_core(self, x: Tensor, name: str) -> Tensor:
        """Return the output with one core, saving x Q_in alone for the backward pass."""
        base: Any = self.base_layer
        core_RS = self.core_RS(name)
        q_out, q_in = self.sparsegrad_q_out[name], self.sparsegrad_q_in[name]
        if is_quantized(base):
            return core_beside(x, base, core_RS, q_out, q_in)
        weight: Tensor = base.weight.T if self.transposed else base.weight
        return core_linear(x, weight, base.bias, core_RS, q_out, q_in)

    def _core_output(self, x: Tensor, name: str) -> Tensor:
        """Return ((x Q_in) S') Q_out' by plain products."""
        q_out, q_in = self.sparsegrad_q_out[name], self.sparsegrad_q_in[name]
        u = x @ q_in.to(x.dtype)  # (..., in) @ (in, r_in)
        h = F.linear(u, self.core_RS(name).to(u.dtype))  # (..., r_in) @ (r_in, r_out)
        return F.linear(h, q_out.to(h.dtype))  # (..., r_out) @ (r_out, out)

    def _check_optimizer(self, names: list[str]) -> None:
        for name in names:
            if not self.sparsegrad_values[name].requires_grad:
                continue
            if self.needs_optimizer.get(name):
                raise RuntimeError(
                    f"adapter {name!r} has a support that the optimizer chooses, and no optimizer "
                    "for it was made: call sparsegrad_cli.peft.optimizer(model, ...) before the "
                    "first step, and train with it"
                )
            before = self.unused_gradient.get(name)
            if before is not None and not torch.compiler.is_compiling():
                self._check_unchanged(name, before)

    def _check_unchanged(self, name: str, before: Tensor) -> None:
        values: Tensor = self.sparsegrad_values[name]
        if before.device == values.device and not torch.equal(before, values.detach().abs().sum()):
            raise RuntimeError(
                f"adapter {name!r} has a support that the optimizer chooses, and something else "
                "than sparsegrad_cli.peft.optimizer has changed its values after a backward pass: "
                "give its result to the training loop, such as "
                "Trainer(..., optimizers=(optimizer, None))"
            )

    def __repr__(self) -> str:
        return f"sparsegrad.{super().__repr__()}"


def _has_hooks(module: nn.Module) -> bool:
    """Return whether the module's call does more than its forward, such as moving weights."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or hasattr(module, "_hf_hook")
    )
