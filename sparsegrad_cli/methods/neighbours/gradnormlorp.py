"""GradNormLoRP: a normalized weight with LoRA's factors, and GaLore on the factors' gradients.

Huang et al. 2024, arXiv 2412.19616. The weight is W = m (W_0 + s B A) / norm of its rows, with one
trainable magnitude m per output, as in DoRA (Liu et al. 2024, arXiv 2402.09353); B A are the
paper's I J. The gradients of A and of B are projected to a lower rank by their leading singular
vectors every T steps, and Adam runs there (GaLore, :mod:`.galore`). The magnitudes are stepped by
plain AdamW.

At the start B is 0, so the first gradient of A is 0 and says nothing about its directions: the
projection of A is chosen again in step 2, and every T steps from there.

Left out: the projection of both sides, U (U' D V) V', of which GaLore's one-sided form keeps the
shorter side; 8-bit states. peft treats the norm of the rows as a constant in the backward pass
(DoRA, Section 4.3).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparsegrad_cli.methods.implementation import Adapted, Factors
from sparsegrad_cli.methods.lora.method import Lora, lora_factors
from sparsegrad_cli.methods.neighbours.galore import GaloreView
from sparsegrad_cli.methods.neighbours.gradient_settings import GradnormlorpSettings
from sparsegrad_cli.methods.neighbours.projected import View, projected_adamw
from sparsegrad_cli.models.targets import Target
from sparsegrad_cli.numerics.hosvd import Basis
from sparsegrad_cli.recipe.schema import TrainSection


class Gradnormlorp(Lora):
    """See :class:`sparsegrad_cli.methods.implementation.Method`."""

    settings: GradnormlorpSettings

    def adapt(
        self,
        model: nn.Module,
        targets: list[Target],
        bases: Mapping[str, Basis],
        scores: Mapping[str, Tensor],
    ) -> Adapted:
        """Put peft's DoRA adapters into the targets; the function is unchanged."""
        adapted = super().adapt(model, targets, bases, scores)
        self.peft_config = None  # The adapter is kept by our names, magnitudes included.
        return adapted

    def optimizer(self, model: nn.Module, train: TrainSection) -> torch.optim.Optimizer:
        """Return AdamW on projections of A and B, plain AdamW on magnitudes, head and rest."""
        chosen, views = self.settings, dict[nn.Parameter, View]()
        for target in self.targets:
            a, b, _ = lora_factors(model, target)
            rank = chosen.projection_rank or max(1, a.shape[0] // 2)
            views[a] = GaloreView(rank, chosen.update_every, chosen.scale, first=2)
            views[b] = GaloreView(rank, chosen.update_every, chosen.scale)
        return projected_adamw(model, views, (), train)

    def merged_OI(self, model: nn.Module, target: Target) -> Tensor:
        """Return m (W_0 + s B A) / norm of its rows."""
        a, b, scale = lora_factors(model, target)
        base_OI = target.weight_OI(model).detach().double()
        changed_OI = base_OI + scale * (b.detach().double() @ a.detach().double())
        layer = model.get_submodule(target.name)
        magnitudes = next(
            p for n, p in layer.named_parameters() if "lora_magnitude_vector" in n
        ).detach()
        merged_OI: Tensor = changed_OI * (magnitudes.double() / changed_OI.norm(dim=1))[:, None]
        return merged_OI

    def factors(self, model: nn.Module, target: Target) -> Factors | None:
        """Return None: the normalization changes the weight by more than a low rank."""
        return None
