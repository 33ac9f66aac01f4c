"""Cross entropy of a linear head, summed, without ever holding the logits.

For hidden states h (N, in), a head W (V, in) and targets: logits z = scale (W h + b), capped to
cap tanh(z / cap) if the model does so. Each block of rows of z gives its part of the loss and, at
once, of the gradients: dL/dz = softmax(z) - onehot, dL/dh = dL/dz W. These two products are those
without blocks. Only dL/dh is kept for the backward pass, and dL/dW if the head trains.

torch 2.13 has a similar torch.nn.functional.linear_cross_entropy. It is not used here: it returns
the sum in the dtype of h, which at N = 1,024 was .9 % off in bfloat16 and overflows above 65,504 in
float16; its automatic blocks of a few rows took 7x the time of blocks of 64 on a CPU; it has no
cap; and the memory meter does not see its scratch space.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Bytes of one block of logits in float32. A GPU wants more rows for each time it reads the head.
_BLOCK_BYTES = {"cpu": 16 << 20}
_BLOCK_BYTES_ELSEWHERE = 64 << 20


def block_rows(vocabulary: int, device: torch.device) -> int:
    """Return the number of rows of logits made at a time; at least 16."""
    return max(16, _BLOCK_BYTES.get(device.type, _BLOCK_BYTES_ELSEWHERE) // (4 * vocabulary))


def linear_cross_entropy(
    hidden_NI: Tensor,
    weight_VI: Tensor,
    target_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    cap: float | None = None,
    rows: int | None = None,
) -> Tensor:
    """Return the sum over N of -log softmax(z)[target], differentiable once.

    Args:
        hidden_NI, weight_VI: of one floating dtype.
        target_N: int64, below V.
        bias_V: of the head, if it has one.
        scale: z is multiplied by it.
        cap: z becomes cap tanh(z / cap).
        rows: of logits at a time; :func:`block_rows` by default.

    Returns:
        A scalar in float32, in float64 for float64 inputs: half precision has no room for a sum.
    """
    rows = rows or block_rows(weight_VI.shape[0], weight_VI.device)
    loss: Tensor = _LinearCrossEntropy.apply(
        hidden_NI, weight_VI, bias_V, target_N, scale, cap, rows
    )
    return loss


@torch.no_grad()
def linear_cross_entropy_sums(
    hidden_NI: Tensor,
    weight_VI: Tensor,
    target_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    cap: float | None = None,
    rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the loss of :func:`linear_cross_entropy` and the number of correct predictions.

    Returns:
        Two scalars, float32 (or float64) and int64.
    """
    rows = rows or block_rows(weight_VI.shape[0], weight_VI.device)
    loss = torch.zeros((), dtype=_wide(hidden_NI.dtype), device=hidden_NI.device)
    correct = torch.zeros((), dtype=torch.int64, device=hidden_NI.device)
    for start in range(0, len(hidden_NI), rows):
        target = target_N[start : start + rows]
        z_BV = _logits(hidden_NI[start : start + rows], weight_VI, bias_V, scale, cap)
        correct += (z_BV.argmax(1) == target).sum()
        loss += (z_BV.logsumexp(1) - z_BV.gather(1, target[:, None])[:, 0]).sum()
        del z_BV
    return loss, correct


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NI: Tensor,
        weight_VI: Tensor,
        bias_V: Tensor | None,
        target_N: Tensor,
        scale: float,
        cap: float | None,
        rows: int,
    ) -> Tensor:
        wide = _wide(hidden_NI.dtype)
        loss = torch.zeros((), dtype=wide, device=hidden_NI.device)
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        dhidden = torch.empty_like(hidden_NI) if for_hidden else None
        dweight = torch.zeros_like(weight_VI, dtype=wide) if for_weight else None
        dbias = torch.zeros_like(bias_V, dtype=wide) if for_bias and bias_V is not None else None
        for start in range(0, len(hidden_NI), rows):
            hidden = hidden_NI[start : start + rows]
            target = target_N[start : start + rows, None]
            z_BV = _logits(hidden, weight_VI, bias_V, scale, cap)
            total_B1 = z_BV.logsumexp(1, keepdim=True)
            loss += (total_B1 - z_BV.gather(1, target)).sum()
            if dhidden is None and dweight is None and dbias is None:
                del z_BV
                continue
            slope = None if cap is None else 1 - (z_BV / cap).square_()
            dz_BV = z_BV.sub_(total_B1).exp_()
            dz_BV.scatter_add_(1, target, dz_BV.new_full((1, 1), -1).expand_as(target))
            if slope is not None:
                dz_BV.mul_(slope)
            if scale != 1:
                dz_BV.mul_(scale)
            if dbias is not None:
                dbias += dz_BV.sum(0)
            if dweight is not None:
                dweight.addmm_(dz_BV.T, hidden.to(wide))
            if dhidden is not None:
                torch.mm(dz_BV.to(weight_VI.dtype), weight_VI, out=dhidden[start : start + rows])
            del z_BV, dz_BV, slope  # or the next block is made while this one is alive
        ctx.save_for_backward(
            dhidden,
            None if dweight is None else dweight.to(weight_VI.dtype),
            None if dbias is None or bias_V is None else dbias.to(bias_V.dtype),
        )
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*(scaled_gradient(d, grads[0]) for d in ctx.saved_tensors), None, None, None, None)


def scaled_gradient(gradient: Tensor | None, g: Tensor) -> Tensor | None:
    """Return gradient times the scalar g."""
    if gradient is None:
        return None
    if gradient.dtype != g.dtype:  # a loss scale does not fit float16
        return (gradient.to(g.dtype) * g).to(gradient.dtype)
    # In place: the head's gradient may be the largest tensor there is. A second backward pass over
    # the same graph is then refused by autograd.
    return gradient.mul_(g)


def _logits(
    hidden_BI: Tensor, weight_VI: Tensor, bias_V: Tensor | None, scale: float, cap: float | None
) -> Tensor:
    """Return z (B, V) in float32 or float64, in its own memory."""
    z_BV = (hidden_BI @ weight_VI.T).to(_wide(hidden_BI.dtype))
    if bias_V is not None:
        z_BV.add_(bias_V)
    if scale != 1:
        z_BV.mul_(scale)
    if cap is not None:
        z_BV.div_(cap).tanh_().mul_(cap)
    return z_BV


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
