"""AdamW that touches few entries: moments and bias correction by each entry's own age.

Adam (Kingma & Ba 2015) with decoupled weight decay (Loshchilov & Hutter 2019), applied at step t
only to the entries chosen at t. Entries that are not chosen keep value and moments bit for bit.
The bias correction of an entry uses the number of times *it* was updated: one shared counter would
give a newly chosen entry a first step of up to 3x the learning rate (its moments are young, the
counter is old).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsegrad_cli.numerics.bounded_moments import BoundedMoments, start_of_second


@dataclass(frozen=True)
class AdamW:
    """Hyper-parameters of one step."""

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Moments:
    """State of one target. All of the target's shape.

    Attributes:
        first, second: running means of the gradient and its square, float32.
        age: how often each entry was updated, int32.
    """

    first: Tensor
    second: Tensor
    age: Tensor

    @staticmethod
    def like(parameter: Tensor) -> Moments:
        """Zero state for a parameter, in float32 or wider."""
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        zeros = torch.zeros_like(parameter, dtype=dtype, memory_format=torch.contiguous_format)
        return Moments(zeros, torch.zeros_like(zeros), torch.zeros_like(zeros, dtype=torch.int32))

    def places(self, indices: Tensor) -> Tensor:
        """Where the state of these entries is: at their own positions."""
        return indices

    def join(self, indices: Tensor, square_k: Tensor, beta2: float) -> None:
        """Start entries that were never updated as if they had been updated from the beginning.

        At age 0 the first step of an entry is lr in size whatever its gradient is, and after a new
        choice many entries would make it at once. With age t, the steps so far, first moment 0 and
        second moment square (1 - beta2^t), the next gradient g gives a step of about
        lr (1 - beta1) g / sqrt(square).

        Args:
            indices: (k,) int64 flat positions; those that have an age are left alone.
            square_k: (k,) what is known of their squared gradients; 0 leaves an entry at age 0.
            beta2: decay of the second moment.
        """
        age, second = self.age.view(-1), self.second.view(-1)
        new = (age[indices] == 0) & (square_k > 0)
        steps = age.max()
        age[indices[new]] = steps
        second[indices[new]] = start_of_second(square_k[new].to(second), steps, beta2)


def step_on_entries(
    indices: Tensor,
    grad_k: Tensor,
    value_k: Tensor,
    moments: Moments | BoundedMoments,
    adamw: AdamW,
) -> Tensor:
    """One AdamW step on chosen entries; updates their moments in place.

    Args:
        indices: (k,) int64 flat positions, without repeats.
        grad_k: (k,) gradient there.
        value_k: (k,) parameter values there (weight decay acts on them).
        moments: state of the target, contiguous.
        adamw: hyper-parameters.

    Returns:
        (k,) what to add to the values.
    """
    places = moments.places(indices)  # first: it may make room
    first, second, age = (m.view(-1) for m in (moments.first, moments.second, moments.age))
    grad_k = grad_k.to(first.dtype)
    m_k = torch.lerp(first[places], grad_k, 1 - adamw.beta1)
    v_k = second[places].mul_(adamw.beta2).addcmul_(grad_k, grad_k, value=1 - adamw.beta2)
    age_k = age[places] + 1
    first[places], second[places], age[places] = m_k, v_k, age_k
    age_k = age_k.to(first.dtype)
    correction1 = 1 - torch.pow(adamw.beta1, age_k)
    correction2 = 1 - torch.pow(adamw.beta2, age_k)
    denominator = v_k.div_(correction2).sqrt_().add_(adamw.eps)
    update = m_k.div_(correction1).div_(denominator).mul_(-adamw.lr)
    if adamw.weight_decay:
        update -= adamw.lr * adamw.weight_decay * value_k.to(update.dtype)
    return update


def sparse_step(
    parameter: Tensor,
    grad: Tensor,
    moments: Moments | BoundedMoments,
    adamw: AdamW,
    choose: Callable[[Tensor], Tensor],
) -> Tensor:
    """Choose entries of ``grad`` and step them, in place on a contiguous ``parameter``.

    Args:
        parameter, grad: same shape.
        choose: gradient -> (k,) flat positions.

    Returns:
        (k,) the chosen positions; k may be 0.
    """
    indices = choose(grad)
    if indices.numel():
        flat = parameter.view(-1)
        values = flat[indices]
        update = step_on_entries(indices, grad.reshape(-1)[indices], values, moments, adamw)
        flat[indices] = (values + update).to(flat.dtype)
    return indices
