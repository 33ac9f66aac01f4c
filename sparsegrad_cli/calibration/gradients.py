"""Backward passes without an update: hooks that take gradients away, and nothing left behind.

The model comes out as it went in: weights, gradients, requires_grad, mode and random state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad_cli.errors import NonFiniteError
from sparsegrad_cli.models.nan_check import first_non_finite
from sparsegrad_cli.models.targets import Target
from sparsegrad_cli.numerics.frozen_linear import product_dtype
from sparsegrad_cli.recipe.schema import TrainSection

Batch = Mapping[str, Any]
IGNORED = -100  # a label that counts for nothing
# Float16 gradients underflow below 6e-8. Training scales its loss dynamically; one fixed scale
# does for passes that update nothing, because what they collect is divided by it again.
_FLOAT16_LOSS_SCALE = 4096.0


@contextmanager
def as_in_training(model: nn.Module, train: TrainSection | None) -> Iterator[float]:
    """Inside, the model recomputes its blocks and autocasts as training will.

    Args:
        model: its ``forward`` is replaced inside, and gradient checkpointing switched on.
        train: the recipe's section; None changes nothing.

    Yields:
        The factor that the loss must be multiplied with before the backward pass, and that
        gradients must be divided by. It is 1 unless the section says ``fp16``.
    """
    if train is None:
        yield 1.0
        return
    patched: Any = model
    recomputes = train.gradient_checkpointing and not patched.is_activation_checkpointing
    half = torch.bfloat16 if train.bf16 else torch.float16 if train.fp16 else None
    own = vars(model).get("forward")
    try:
        if recomputes:
            patched.activation_checkpointing_enable({"use_reentrant": False})
            # Blocks below the first target need no gradient: only reentrant checkpoints would.
            patched.disable_input_require_grads()
        if half is not None:
            device = next(model.parameters()).device.type
            patched.forward = torch.autocast(device, half)(model.forward)
        yield _FLOAT16_LOSS_SCALE if train.fp16 else 1.0
    finally:
        if half is not None:
            del patched.forward
            if own is not None:
                patched.forward = own
        if recomputes:
            patched.activation_checkpointing_disable()


def micro_batches(batch: Batch, most: int) -> list[tuple[Batch, float]]:
    """A batch cut by rows, and what each part's loss is multiplied with to add up to the whole's.

    Args:
        batch: tensors of as many rows; anything else is left whole.
        most: parts, or as many as there are rows.

    Returns:
        The parts. With one label a row, losses are means over rows: the factor is the share of the
        rows. With labels by token, ``num_items_in_batch`` goes along, by which the model divides.
    """
    labels = batch.get("labels")
    whole: list[tuple[Batch, float]] = [(batch, 1.0)]
    if not isinstance(labels, Tensor) or labels.dim() == 0:
        return whole
    rows = labels.shape[0]
    alike = all(isinstance(t, Tensor) and t.shape[:1] == (rows,) for t in batch.values())
    if not alike or min(most, rows) < 2:
        return whole
    more: dict[str, Tensor] = {}
    if labels.dim() > 1:
        more["num_items_in_batch"] = (labels[:, 1:] != IGNORED).sum()
    size = -(-rows // most)
    parts: list[tuple[Batch, float]] = []
    for start in range(0, rows, size):
        part = {name: tensor[start : start + size] for name, tensor in batch.items()}
        share = 1.0 if more else len(part["labels"]) / rows
        parts.append((part | more, share))
    return parts


def gradient_step(
    model: nn.Module, batch: Batch, step: int, *, share: float = 1.0, scale: float = 1.0
) -> float:
    """Forward and backward on one batch; the hooks take the gradients away at once.

    Args:
        model, batch: the model's output has ``loss``.
        step: for the error.
        share: what the loss is multiplied with (:func:`micro_batches`).
        scale: what gradients are multiplied with on the way back (:func:`as_in_training`).

    Returns:
        The loss, multiplied by ``share``.
    """
    loss: Tensor = model(**batch).loss * share
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
    (loss * scale if scale != 1.0 else loss).backward()
    return value


@contextmanager
def gradients_only(
    model: nn.Module,
    targets: list[Target],
    collect: Callable[[Target, Tensor], None],
    *,
    scale: float = 1.0,
) -> Iterator[None]:
    """Inside, only the targets' weights get gradients; each is handed over and freed at once.

    ``collect(target, grad_OI)`` is called per target and backward pass with dL/dW (out, in), during
    the backward pass, so that never more than one of them is alive. The model comes out as it went
    in (:func:`frozen_for_a_while`). ``scale`` is that of :func:`gradient_step`, and is divided out.
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
            grad = _unscaled(grad, scale)
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


def _unscaled(grad: Tensor, scale: float) -> Tensor:
    """Divide by the loss scale, in float32: the quotient may be too small for float16."""
    return grad if scale == 1.0 else grad.float() / scale


class _Tap(torch.autograd.Function):
    """y itself; in the backward pass, dL/dy and x are handed over.

    x is a saved tensor like any other, so a checkpoint drops it and computes it again, and a
    forward pass that is only such a recomputation hands nothing over.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        anchor: Tensor,
        collect: Callable[[Tensor, Tensor], None],
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.collect = collect
        # As an output that was changed in place it stays y: a view could not be added to in place.
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, None, None, None]:
        (g,) = grads
        (x,) = ctx.saved_tensors
        ctx.collect(g, x)
        return (g if ctx.needs_input_grad[0] else None), None, None, None


@contextmanager
def tokens_only(
    model: nn.Module,
    targets: list[Target],
    collect: Callable[[Target, Tensor, Tensor], None],
    *,
    scale: float = 1.0,
) -> Iterator[None]:
    """Inside, no parameter gets a gradient; inputs and output gradients of targets are handed over.

    ``collect(target, g_NO, x_NI)`` is called per target and backward pass with dL/dy (N, out) and x
    (N, in). No weight gradient is ever formed. Under autocast, x is rounded as the layer rounds it.
    ``scale`` is that of :func:`gradient_step`, and is divided out.
    """
    # Below the first target nothing wants a gradient: its output gets one through the anchor.
    anchor = torch.empty(0, device=next(model.parameters()).device, requires_grad=True)

    def hook_for(target: Target) -> Callable[..., Tensor]:
        def take(g: Tensor, x: Tensor) -> None:
            g_NO = _unscaled(g, scale).reshape(-1, target.out_features)
            collect(target, g_NO, x.reshape(-1, target.in_features))

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return output
            x = inputs[0].detach()
            tapped: Tensor = _Tap.apply(output, x.to(product_dtype(x)), anchor, take)
            return tapped

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
