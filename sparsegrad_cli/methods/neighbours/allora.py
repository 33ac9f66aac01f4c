"""ALLoRA: LoRA without alpha and dropout, whose rows step by the size of their change.

Huang & Balestriero 2024, arXiv 2410.09692, Section 4.2: row i of the gradient of B A is multiplied
by 1 / sqrt(norm((B A)_i) + 1 / eta^2). It is eta at the start, where B = 0, and falls as the row
grows.

The paper puts this factor on the gradient and calls it a learning rate. Adam divides a gradient by
its own running size, so a factor that changes slowly would have no effect there. We put it on the
update: row i of B moves by the factor times what the optimizer would have moved it. Row i of B is
all of row i of B A that depends on i. Left out: the factor in the gradient of A, which mixes all
rows; and the variants by output (ALLoRA-OD, ASF-LoRA), which the paper finds worse.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad_cli.methods.lora.method import Lora, lora_factors
from sparsegrad_cli.methods.neighbours.gradient_settings import AlloraSettings
from sparsegrad_cli.recipe.schema import TrainSection


def row_factors(a_RI: Tensor, b_OR: Tensor, eta_squared: float) -> Tensor:
    """Return 1 / sqrt(norm((B A)_i) + 1 / eta^2) for each row i, (out,).

    norm((B A)_i)^2 is b_i (A A') b_i', so that B A (out, in) is not needed.

    Args:
        a_RI: A, (r, in).
        b_OR: B, (out, r).
        eta_squared: eta^2.
    """
    gram_RR = a_RI @ a_RI.T  # (r, in) @ (in, r)
    squares_O = ((b_OR @ gram_RR) * b_OR).sum(1)  # (out, r) @ (r, r)
    return (squares_O.clamp(min=0).sqrt() + 1 / eta_squared).rsqrt()


def scale_rows_of_steps(
    optimizer: torch.optim.Optimizer,
    pairs: Sequence[tuple[nn.Parameter, nn.Parameter]],
    eta_squared: float,
) -> None:
    """Let an optimizer move row i of each B by its factor times the plain step.

    Args:
        optimizer: any.
        pairs: (A, B) of each target.
        eta_squared: as in :func:`row_factors`.
    """
    before: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def remember(*ignored: Any) -> None:
        before[:] = [(b.clone(), row_factors(a, b, eta_squared)) for a, b in pairs]

    @torch.no_grad()
    def scale(*ignored: Any) -> None:
        for (_a, b), (old_OR, factors_O) in zip(pairs, before, strict=True):
            b.sub_(old_OR).mul_(factors_O[:, None]).add_(old_OR)
        before.clear()

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(scale)


class Allora(Lora):
    """See :class:`sparsegrad_cli.methods.implementation.Method`."""

    settings: AlloraSettings

    def optimizer(self, model: nn.Module, train: TrainSection) -> torch.optim.Optimizer:
        """Return the recipe's optimizer, with scaled steps of B."""
        made = super().optimizer(model, train)
        pairs = [lora_factors(model, target)[:2] for target in self.targets]
        scale_rows_of_steps(made, pairs, self.settings.eta_squared)
        return made
