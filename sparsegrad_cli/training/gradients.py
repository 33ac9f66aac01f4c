"""Backward passes without an update: hooks that take gradients away, and nothing left behind.

The model comes out as it went in: weights, gradients, requires_grad, mode and random state.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsegrad_cli.errors import NonFiniteError
from sparsegrad_cli.modeling.targets import Target
from sparsegrad_cli.training.finite import first_non_finite

Batch = Mapping[str, Any]


def gradient_step(model: nn.Module, batch: Batch, step: int) -> float:
    """Forward and backward on one batch; the hooks take the gradients away at once."""
    loss: Tensor = model(**batch).loss
    value = float(loss.detach())
    if not torch.isfinite(loss.detach()):
        del loss
        module = first_non_finite(model, lambda: model(**batch).loss)
        raise NonFiniteError(
            f"the loss of calibration step {step} is {value}: there is no gradient to learn from",
            where="calibration",
            fix="use model.dtype: float32, or look at the data of this step",
            more=[f"first not finite: {module}"] if module else [],
            details={"step": step, "module": module},
        )
    loss.backward()
    return value


@contextmanager
def gradients_only(
    model: nn.Module, targets: list[Target], collect: Callable[[Target, Tensor], None]
) -> Iterator[None]:
    """Inside, only the targets' weights get gradients; each is handed over and freed at once.

    ``collect(target, grad_OI)`` is called per target and backward pass with dL/dW (out, in), during
    the backward pass, so that never more than one of them is alive. The model comes out as it went
    in (:func:`frozen_for_a_while`).
    """
    weights = {}
    for target in targets:
        weight = model.get_submodule(target.name).weight
        assert isinstance(weight, nn.Parameter)
        weights[target.name] = weight

    def hook_for(target: Target) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            grad = parameter.grad
            assert grad is not None
            parameter.grad = None
            collect(target, grad.T if target.transposed else grad)

        return hook

    handles = []
    with frozen_for_a_while(model):
        try:
            for target in targets:
                weight = weights[target.name]
                weight.requires_grad_(True)
                handles.append(weight.register_post_accumulate_grad_hook(hook_for(target)))
            yield
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def tokens_only(
    model: nn.Module, targets: list[Target], collect: Callable[[Target, Tensor, Tensor], None]
) -> Iterator[None]:
    """Inside, no parameter gets a gradient; inputs and output gradients of targets are handed over.

    ``collect(target, g_NO, x_NI)`` is called per target and backward pass with dL/dy (N, out) and x
    (N, in). No weight gradient is ever formed.
    """

    def hook_for(target: Target) -> Callable[..., Tensor]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x_NI = inputs[0].detach().reshape(-1, target.in_features)
            if not output.requires_grad:  # the first target: nothing before it wants a gradient
                output = output.detach().requires_grad_()
            if torch.is_grad_enabled():
                output.register_hook(
                    lambda g: collect(target, g.reshape(-1, target.out_features), x_NI)
                )
            return output

        return hook

    handles = []
    with frozen_for_a_while(model):
        try:
            for target in targets:
                layer = model.get_submodule(target.name)
                handles.append(layer.register_forward_hook(hook_for(target)))
            yield
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def frozen_for_a_while(model: nn.Module) -> Iterator[None]:
    """Inside, the model trains (dropout) and no parameter wants a gradient.

    On the way out, requires_grad, gradients and mode (train/eval) are what they were.
    """
    parameters = list(model.parameters())
    wanted = [p.requires_grad for p in parameters]
    kept = [p.grad for p in parameters]
    modes = [(module, module.training) for module in model.modules()]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
        model.train()
        yield
    finally:
        for parameter, requires, grad in zip(parameters, wanted, kept, strict=True):
            parameter.grad = grad
            parameter.requires_grad_(requires)
        for module, training in modes:
            module.training = training


@contextmanager
def forked_random(seed: int) -> Iterator[None]:
    """Seed torch, numpy and python inside; restore their random state on the way out."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
