"""Calibration: gradient steps with no update, streamed into Gram matrices.

The model comes out as it went in: weights, gradients, requires_grad, mode and random state.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsegrad_cli.errors import SparsegradError
from sparsegrad_cli.modeling.targets import Target
from sparsegrad_cli.numerics.hosvd import Basis, GramStream

Batch = Mapping[str, Any]
Batches = Callable[[int], Iterator[Batch]]


@dataclass
class Calibration:
    """What calibration found.

    Attributes:
        bases: key -> basis (key: target name, or layer kind).
        keys: target name -> key.
        streams: key -> Gram sums, kept for diagnostics until dropped.
        seconds: wall time of gradients and eigenvectors.
        stream_bytes: bytes of all Gram sums; the part of the peak that calibration itself adds.
    """

    bases: dict[str, Basis]
    keys: dict[str, str]
    streams: dict[str, GramStream]
    seconds: float
    stream_bytes: int
    losses: list[float] = field(default_factory=list)

    def by_target(self) -> dict[str, Basis]:
        """Target name -> basis; targets of one key share the object."""
        return {name: self.bases[key] for name, key in self.keys.items()}


def calibrate(
    model: nn.Module,
    targets: list[Target],
    batches: Iterator[Batch],
    *,
    steps: int,
    basis_per: str,
    seed: int,
    source: str = "batch",
    meter: Callable[[], AbstractContextManager[Any]] = nullcontext,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Calibration:
    """Stream ``steps`` gradients of every target into Grams, then take their eigenvectors.

    Args:
        model: any model whose output has ``loss``; left as it was found.
        batches: yields at least ``steps`` batches on the model's device.
        basis_per: ``layer`` (one basis per target) or ``kind`` (the paper: per layer kind).
        seed: for dropout during calibration; the global random state is restored.
        source: ``batch`` (Grams of the batch's gradients, the paper) or ``token`` (of its tokens).
        meter: context in which the first two steps and the eigenvectors are measured.
        on_step: told after each step: number from 1, loss.

    Raises:
        SparsegradError: a loss or gradient is not finite.
    """
    keys = {t.name: t.name if basis_per == "layer" else t.kind for t in targets}
    device = next(model.parameters()).device
    started = time.perf_counter()
    streams: dict[str, GramStream] = {}
    for target in targets:
        if keys[target.name] not in streams:
            streams[keys[target.name]] = GramStream(
                target.out_features, target.in_features, device=device
            )

    def collect(target: Target, grad_OI: Tensor) -> None:
        streams[keys[target.name]].add(grad_OI)

    def collect_tokens(target: Target, g_NO: Tensor, x_NI: Tensor) -> None:
        streams[keys[target.name]].add_tokens(g_NO, x_NI)

    hooks = (
        gradients_only(model, targets, collect)
        if source == "batch"
        else tokens_only(model, targets, collect_tokens)
    )
    losses = []
    with hooks, forked_random(seed):
        for step in range(1, steps + 1):
            with meter() if step <= 2 else nullcontext():
                losses.append(gradient_step(model, next(batches), step))
            on_step(step, losses[-1])
    with meter():
        bases = {key: _finite_basis(key, stream) for key, stream in streams.items()}
    seconds = time.perf_counter() - started
    return Calibration(
        bases, keys, streams, seconds, sum(s.nbytes() for s in streams.values()), losses
    )


def _finite_basis(key: str, stream: GramStream) -> Basis:
    try:
        return stream.basis()
    except ValueError as error:
        raise SparsegradError(
            f"calibration of {key} found no basis: {error}",
            where="calibration",
            fix="use model.dtype: float32, or look at the data of these steps",
        ) from error


def gradient_step(model: nn.Module, batch: Batch, step: int) -> float:
    """Forward and backward on one batch; the hooks take the gradients away at once."""
    loss: Tensor = model(**batch).loss
    value = float(loss.detach())
    if not torch.isfinite(loss.detach()):
        raise SparsegradError(
            f"the loss of calibration step {step} is {value}: there is no gradient to learn from",
            where="calibration",
            fix="use model.dtype: float32, or look at the data of this step",
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
