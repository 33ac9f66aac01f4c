"""LoRA-Pro: LoRA whose gradients of A and B together come closest to the gradient of W.

Wang et al. 2024, arXiv 2407.18242. With W + s B A and the gradients g_A = s B' G, g_B = s G A' of
LoRA, a step along (h_A, h_B) changes W by s (B h_A + h_B A) to first order. The minimizers of
norm(s B h_A + s h_B A - G) are

    h_A = (B'B)^-1 g_A / s^2 + X A
    h_B = (I - B (B'B)^-1 B') g_B (A A')^-1 / s^2 - B X

for any X (r, r), without knowing G. Of them, the paper takes the one nearest to (g_A, g_B), whose
X solves the Sylvester equation B'B X + X A A' = -(B'B)^-1 g_A A' / s^2.

The corrected gradients go into the optimizer of the recipe. Left out: the paper's form of AdamW,
whose moments are those of the whole (out, in) gradient and cost as much memory as full
fine-tuning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad_cli.methods.lora.method import Lora, lora_factors
from sparsegrad_cli.recipe.schema import TrainSection

_FLOOR = 1e-8  # smallest eigenvalue of a Gram matrix, as a share of the largest
_ZERO = 1e-12  # the same for a matrix of zeros, such as B at the start
Pair = tuple[nn.Parameter, nn.Parameter, float]


def _spectrum(gram_RR: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues (r,), bounded away from 0, and eigenvectors (r, r)."""
    values, vectors = torch.linalg.eigh(gram_RR)
    return torch.maximum(values, values[-1] * _FLOOR).clamp(min=_ZERO), vectors


def corrected_gradients(
    a_RI: Tensor, b_OR: Tensor, grad_a: Tensor, grad_b: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return (h_A, h_B) of the module's docstring, in the shapes and dtypes of the gradients.

    At B = 0, where g_A is 0, h_A is 0.

    Args:
        a_RI: A, (r, in).
        b_OR: B, (out, r).
        grad_a, grad_b: gradients of the loss, in their shapes.
        scale: s.
    """
    a_RI, b_OR = a_RI.double(), b_OR.double()
    g_RI, g_OR = grad_a.double() / scale**2, grad_b.double() / scale**2
    of_b, u_RR = _spectrum(b_OR.T @ b_OR)  # (r, out) @ (out, r)
    of_a, v_RR = _spectrum(a_RI @ a_RI.T)  # (r, in) @ (in, r)
    plain_RI = u_RR @ ((u_RR.T @ g_RI) / of_b[:, None])  # (r, r) @ (r, in)
    plain_OR = ((g_OR @ v_RR) / of_a) @ v_RR.T  # (out, r) @ (r, r)
    inside_RR = u_RR @ ((u_RR.T @ (b_OR.T @ plain_OR)) / of_b[:, None])  # (r, out) @ (out, r)
    right_RR = -plain_RI @ a_RI.T  # (r, in) @ (in, r)
    x_RR = u_RR @ ((u_RR.T @ right_RR @ v_RR) / (of_b[:, None] + of_a)) @ v_RR.T  # all (r, r)
    h_RI = plain_RI + x_RR @ a_RI  # (r, r) @ (r, in)
    h_OR = plain_OR - b_OR @ (inside_RR + x_RR)  # (out, r) @ (r, r)
    return h_RI.to(grad_a.dtype), h_OR.to(grad_b.dtype)


def correct_before_steps(optimizer: torch.optim.Optimizer, pairs: Sequence[Pair]) -> None:
    """Let an optimizer correct the gradients of these pairs (A, B, s) before each of its steps."""

    @torch.no_grad()
    def correct(*_: Any) -> None:
        for a, b, scale in pairs:
            if a.grad is not None and b.grad is not None:
                a.grad, b.grad = corrected_gradients(a, b, a.grad, b.grad, scale)

    optimizer.register_step_pre_hook(correct)


class LoraPro(Lora):
    """See :class:`sparsegrad_cli.methods.implementation.Method`."""

    def optimizer(self, model: nn.Module, train: TrainSection) -> torch.optim.Optimizer:
        """Return the recipe's optimizer, which corrects gradients before its steps."""
        made = super().optimizer(model, train)
        correct_before_steps(made, [lora_factors(model, target) for target in self.targets])
        return made
