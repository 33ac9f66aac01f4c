"""LoRA-GGPO: LoRA that trains under random noise on the whole weight.

Chang et al. 2025, "LoRA-GGPO: Mitigating Double Descent in LoRA Fine-Tuning via Gradient-Guided
Perturbation Optimization", arXiv 2502.14538 (first version). In training the
layer multiplies by W + s B A + E, where the entries of row i of E are normal with variance

    sigma^2 / in * (|W_i + s (B A)_i|^2 + beta |G_i|^2)

and G_i is row i of the gradient with respect to the merged weight. That gradient is never made:
G = s (dB A + B dA), from the gradients of the factors, has the row norms that are used. Both norms
are those of the last optimizer step.

E lives only while a product needs it: the forward pass draws a seed, and the backward pass draws E
again from the seed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsegrad_cli.methods.neighbours.adaptive_settings import GgpoSettings
from sparsegrad_cli.methods.neighbours.change import ChangeMethod, FrozenLayer, LowRankChange, Place
from sparsegrad_cli.methods.optimizer import make_optimizer
from sparsegrad_cli.numerics.frozen_linear import adapter_linear
from sparsegrad_cli.numerics.weight_noise import noise_seed, row_noise
from sparsegrad_cli.recipe.schema import TrainSection

_NOISE = "noise"


class GgpoChange(LowRankChange):
    """D = s B A with B (out, r), A (r, in), and noise of a standard deviation per row.

    Args:
        place: where the change goes.
        scale: s.
        sigma, beta: as in the formula.
    """

    noise: Tensor

    def __init__(self, place: Place, scale: float, sigma: float, beta: float) -> None:
        super().__init__()
        like, rank = place.like, place.rank
        self.b = nn.Parameter(like.new_zeros(place.out_features, rank))
        self.a = nn.Parameter(like.new_empty(rank, place.in_features))
        self.scale, self.sigma, self.beta = scale, sigma, beta
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        self._read_weight = place.read_weight
        # Standard deviations, (out,): the optimizer's state keeps them for a resumed run.
        self.register_buffer("noise", self._deviations(None, None), persistent=False)

    def product(self) -> tuple[Tensor, Tensor]:
        """Return s B and A."""
        return self.b * self.scale, self.a

    @torch.no_grad()
    def update_noise(self) -> None:
        """Compute the deviations from the weights and gradients as they are."""
        self.noise.copy_(self._deviations(self.b.grad, self.a.grad))

    @torch.no_grad()
    def _deviations(self, db_OR: Tensor | None, da_RI: Tensor | None) -> Tensor:
        merged_OI = self._read_weight().to(self.b.dtype) + self.scale * self.b @ self.a
        variance_O = merged_OI.square().sum(1)
        if db_OR is not None and da_RI is not None:
            # G = s (dB A + B dA) is a product of rank 2r: its row norms need no (out, in) matrix.
            left_OR = torch.cat((db_OR, self.b), dim=1)
            right_RI = torch.cat((self.a, da_RI))
            rows_OR = left_OR @ (right_RI @ right_RI.T)  # (out, 2r) @ (2r, in) @ (in, 2r)
            squares_O = (rows_OR * left_OR).sum(1).clamp_(min=0)
            variance_O += self.beta * self.scale**2 * squares_O
        return (variance_O / self.a.shape[1]).sqrt_() * self.sigma

    def forward(self, x: Tensor) -> Tensor:
        """Return x (D + E)', by plain products; E is zero outside training."""
        y = super().forward(x)
        if not (self.training and torch.is_grad_enabled()):
            return y
        noise_OI: Tensor = row_noise(noise_seed(), self.noise, self.a.shape[1])
        return y + F.linear(x.to(noise_OI.dtype), noise_OI)  # (..., in) @ (in, out)

    def beside(self, x: Tensor, base: FrozenLayer) -> Tensor:
        """Return x (W + E)' + b + (x A') (s B)'; E is zero outside training."""
        if not (self.training and torch.is_grad_enabled()):
            return super().beside(x, base)
        seed, deviations_O, columns = noise_seed(), self.noise, self.a.shape[1]

        def noisy_OI() -> Tensor:
            noise_OI: Tensor = row_noise(seed, deviations_O, columns)
            return self._read_weight() + noise_OI

        def product(flat_NI: Tensor) -> Tensor:
            return F.linear(flat_NI, noisy_OI().to(flat_NI.dtype))  # (N, in) @ (in, out)

        b_OR, a_RI = self.product()
        y = adapter_linear(
            x, None, None, a_RI, b_OR, scaling=1.0, product=product, unpacked=noisy_OI
        )
        bias_O = base.any_bias_O
        return y if bias_O is None else y + bias_O.to(y.dtype)


class Ggpo(ChangeMethod):
    """See :class:`sparsegrad_cli.methods.implementation.Method`."""

    settings: GgpoSettings

    def make_change(self, place: Place) -> GgpoChange:
        """Return a change whose B is zero."""
        settings = self.settings
        scale = (settings.alpha or 2 * place.rank) / place.rank
        return GgpoChange(place, scale, settings.sigma, settings.beta)

    def optimizer(self, model: nn.Module, train: TrainSection) -> torch.optim.Optimizer:
        """Return AdamW that computes the deviations of the noise again after each step."""
        changes = [module for module in model.modules() if isinstance(module, GgpoChange)]
        optimizer = make_optimizer(model, train)

        def measure(*_: object) -> None:
            for change in changes:
                change.update_noise()
                if optimizer.state[change.b]:  # empty until AdamW has stepped B
                    optimizer.state[change.b][_NOISE] = change.noise

        def restore(_: torch.optim.Optimizer) -> None:
            for change in changes:
                if (kept := optimizer.state[change.b].get(_NOISE)) is not None:
                    change.noise.copy_(kept)
                    optimizer.state[change.b][_NOISE] = change.noise

        optimizer.register_step_post_hook(measure)
        optimizer.register_load_state_dict_post_hook(restore)
        return optimizer
