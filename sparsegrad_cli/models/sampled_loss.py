"""The training loss of a language model over a sample of the vocabulary; see train.loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from sparsegrad_cli import distributed
from sparsegrad_cli.numerics.sampled_cross_entropy import (
    rece_sets,
    sampled_cross_entropy,
    sce_sets,
)
from sparsegrad_cli.numerics.seeding import generator_of
from sparsegrad_cli.recipe.schema import Recipe

Draw = tuple[int, int]  # Optimizer step and micro-batch, each from 1.


@dataclass(frozen=True)
class SampledLoss:
    """Scalable Cross-Entropy or RECE with a recipe's settings.

    What is drawn follows from the seed, the process, and the place in training, so that a resumed
    run draws the same.

    Attributes:
        name: ``train.loss``.
        seed: of the recipe.
        settings: arguments of :func:`~.sampled_cross_entropy.sce_sets` or ``rece_sets``.
    """

    name: Literal["sce", "rece"]
    seed: int
    settings: dict[str, Any]

    @classmethod
    def of(cls, recipe: Recipe) -> SampledLoss | None:
        """Return the loss of a recipe's training steps; None for the full loss."""
        train = recipe.train
        if train.loss == "full":
            return None
        if train.loss == "sce":
            settings = {
                "buckets": train.loss_buckets,
                "positions": train.loss_bucket_positions,
                "classes": train.loss_bucket_classes,
                "mix": train.loss_mix,
            }
        else:
            settings = {
                "chunks": train.loss_buckets,
                "neighbours": train.loss_neighbours,
                "rounds": train.loss_rounds,
            }
        return cls(train.loss, recipe.seed, settings)

    def __call__(
        self, hidden_NI: Tensor, weight_VI: Tensor, target_N: Tensor, *, draw: Draw, **head: Any
    ) -> Tensor:
        """Return an estimate of the sum of the full loss over N positions, a scalar.

        Args:
            hidden_NI, weight_VI, target_N, head: see
                :func:`~sparsegrad_cli.numerics.linear_cross_entropy.linear_cross_entropy`.
            draw: the place in training.
        """
        generator = generator_of(self.seed, *draw, distributed.rank())
        choose = sce_sets if self.name == "sce" else rece_sets
        sets = choose(hidden_NI.detach(), weight_VI.detach(), generator, **self.settings)
        return sampled_cross_entropy(hidden_NI, weight_VI, target_N, sets, **head)
