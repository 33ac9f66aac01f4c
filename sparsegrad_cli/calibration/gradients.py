"""Run backward passes without an update, with hooks that collect gradients.

The model is restored: weights, gradients, requires_grad, mode and random state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad_cli.errors import NonFiniteError
from sparsegrad_cli.models.nan_check import first_non_finite
from sparsegrad_cli.models.precision import autocast_dtype
from sparsegrad_cli.models.targets import Target
from sparsegrad_cli.numerics.core_linear import product_dtype
from sparsegrad_cli.recipe.schema import TrainSection

Batch = Mapping[str, Any]
IGNORED = -100  # The label of positions that the loss ignores.
# Float16 gradients underflow below 6e-8. Training scales its loss dynamically. A fixed scale is
# enough here, because no weights are updated and collected gradients are divided by it again.
_FLOAT16_LOSS_SCALE = 4096.0


@contextmanager
def as_in_training(model: nn.Module, train: TrainSection | None) -> Iterator[float]:
    """Apply the gradient checkpointing and autocast of training inside the context.

    Args:
        model: its ``forward`` is replaced and gradient checkpointing enabled inside.
        train: the recipe's ``train`` section; None changes nothing.

    Yields:
        The loss scale: multiply the loss by it before the backward pass, and divide gradients by
        it. It is 1 unless ``fp16`` is set.
    """
    if train is None:
        yield 1.0
        return
    patched: Any = model
    recomputes = train.gradient_checkpointing and not patched.is_activation_checkpointing
    half = autocast_dtype(train)
    own = vars(model).get("forward")
    try:
        if recomputes:
            patched.activation_checkpointing_enable({"use_reentrant": False})
            # Blocks below the first target need no gradient. Only reentrant checkpoints need one.
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
    """Split a batch by rows, with factors that make the losses of the parts add up to its loss.

    Args:
        batch: tensors with the same number of rows; any other batch is returned whole.
        most: maximum number of parts; a batch with fewer rows gives one part per row.

    Returns:
        The parts, each with the factor for its loss. With labels of rows, the loss is a mean over
        rows and the factor is the part's share of the rows. With one (integer) label per token,
        the factor is 1, and the part holds ``num_items_in_batch``, by which the model divides.
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
    if labels.dim() > 1 and not labels.is_floating_point():
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
    """Run forward and backward on one batch; hooks collect and free the gradients.

    Args:
        model: any model whose output has ``loss``.
        batch: arguments of its ``forward``.
        step: number of the step, for the error.
        share: factor of the loss (:func:`micro_batches`).
        scale: loss scale of the backward pass (:func:`as_in_training`).

    Returns:
        The loss multiplied by ``share``.

    Raises:
        NonFiniteError: the loss is NaN or infinite.
        ValueError: the model returned no loss.
    """
    loss = _loss(model(**batch)) * share
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


def _loss(output: Any) -> Tensor:
    loss = getattr(output, "loss", None)
    if loss is None:
        raise ValueError(
            f"calibrate: the model returned {type(output).__name__} and no loss: batches need "
            "labels, or pass pairs (inputs, targets) with loss="
        )
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"calibrate: expected a loss that is a scalar tensor, got {got}")
    return loss


@contextmanager
def gradients_only(
    model: nn.Module,
    targets: list[Target],
    collect: Callable[[Target, Tensor], None],
    *,
    scale: float = 1.0,
) -> Iterator[None]:
    """Collect the weight gradients of the targets inside; no other parameter gets a gradient.

    The model is restored (:func:`frozen_for_a_while`).

    Args:
        model: the model that holds the targets.
        targets: the target modules.
        collect: called during the backward pass with each target and its dL/dW (out, in). The
            gradient is freed after the call, so only one is alive at a time.
        scale: loss scale of :func:`gradient_step`; gradients are divided by it.
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
    """Divide by the loss scale in float32, because the quotient may be too small for float16."""
    return grad if scale == 1.0 else grad.float() / scale


class _Tap(torch.autograd.Function):
    """Return y unchanged, and pass dL/dy and x to ``collect`` in the backward pass.

    x is an ordinary saved tensor. Gradient checkpointing therefore drops and recomputes it, and the
    forward pass that recomputes it does not call ``collect``.
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
        # Marked dirty, the output is y itself. Otherwise it would be a view, which does not allow
        # in-place addition.
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
    """Collect inputs and output gradients of the targets inside; no parameter gets a gradient.

    No weight gradient is formed. Under autocast, x is rounded as the layer rounds it.

    Args:
        model: the model that holds the targets; it is restored (:func:`frozen_for_a_while`).
        targets: the target modules.
        collect: called during the backward pass with each target, its dL/dy (N, out) and x (N, in).
        scale: loss scale of :func:`gradient_step`; gradients are divided by it.
    """
    # No parameter requires a gradient, so the anchor makes the targets' outputs require one.
    anchor = torch.empty(0, device=next(model.parameters()).device, requires_grad=True)

    def hook_for(target: Target) -> Callable[..., Tensor]:
        def take(g: Tensor, x: Tensor) -> None:
            g_NO = _unscaled(g, scale).reshape(-1, target.out_features)
            collect(target, g_NO, x.reshape(-1, target.in_features))

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return output
            x = inputs[0].detach()
            tapped: Tensor = _Tap.apply(output, x.to(product_dtype(x, x.dtype)), anchor, take)
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
    """Put the model into training mode (dropout) and freeze all parameters inside the context.

    Afterwards, requires_grad, gradients and mode (train/eval) are restored.
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
