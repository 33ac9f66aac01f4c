"""PELA: W becomes B A everywhere, is brought back close to W by distillation, and trains.

Guo et al. 2024, "PELA: Learning Parameter-Efficient Models with Low-Rank Approximation", arXiv
2310.10700. Every W is replaced by its best approximation of a rank at which the factors
have fewer parameters. In a stage before fine-tuning, the factors alone minimize

    L_base + alpha L_fd + beta L_wp

where L_fd is the mean squared distance of the features to those of the model with W, and L_wp the
largest absolute entry of W - B A; both are means over the modules. Then the factors are fine-tuned.

The stage is here a part of the run: it takes one AdamW step for each of ``calibration.steps``
batches of the training data, before the first step that is logged. L_base is the loss of the task,
and the features are the outputs of the target modules. The paper runs it on pre-training data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsegrad_cli.errors import NonFiniteError
from sparsegrad_cli.methods.implementation import Adapted, TrainingData
from sparsegrad_cli.methods.neighbours.factor_settings import PelaSettings
from sparsegrad_cli.methods.neighbours.low_rank import FactoredLinear, LowRankMethod, wide_OI
from sparsegrad_cli.models.module_trace import evaluating
from sparsegrad_cli.models.precision import HALF
from sparsegrad_cli.models.quantized import dtype_of
from sparsegrad_cli.models.targets import Target
from sparsegrad_cli.numerics.hosvd import Basis


class Pela(LowRankMethod):
    """See :class:`sparsegrad_cli.methods.implementation.Method`."""

    settings: PelaSettings

    def ranks(self, model: nn.Module, targets: list[Target]) -> Mapping[str, int]:
        """Return the rank of every target."""
        return {t.name: self.settings.rank(t.out_features, t.in_features) for t in targets}

    def adapt(
        self,
        model: nn.Module,
        targets: list[Target],
        bases: Mapping[str, Basis],
        scores: Mapping[str, Tensor],
    ) -> Adapted:
        """Replace W by factors everywhere, and distill them if there are batches."""
        plain = {target.name: model.get_submodule(target.name) for target in targets}
        weights = {target.name: wide_OI(model, target) for target in targets}
        adapted = super().adapt(model, targets, bases, scores)
        if self.training is not None:
            steps = self._distill(model, plain, weights, self.training)
            adapted.note += f"; distilled for {steps} steps"
        return adapted

    def _distill(
        self,
        model: nn.Module,
        plain: Mapping[str, nn.Module],
        weights: Mapping[str, Tensor],
        training: TrainingData,
    ) -> int:
        """Train the factors against the model with the plain layers; return the steps taken."""
        factored = {n: m for n, m in model.named_modules() if isinstance(m, FactoredLinear)}
        parameters = [p for layer in factored.values() for p in (layer.b, layer.a)]
        optimizer = torch.optim.AdamW(
            parameters, lr=self.settings.distill_learning_rate, weight_decay=0.0
        )
        dtypes = {dtype_of(layer) for layer in plain.values()} & set(HALF)
        half = next(iter(dtypes), None)
        scale = 4096.0 if half == torch.float16 else 1.0
        # What trains is float32 among half-precision weights: autocast joins the two.
        joined = torch.autocast(parameters[0].device.type, half, enabled=half is not None)
        steps = 0
        with evaluating(model):
            for batch in training.batches():
                with _layers(model, plain, factored), torch.no_grad(), _outputs(model, plain) as of:
                    with joined:
                        training.loss(batch)
                    wanted = dict(of)
                with _outputs(model, plain) as features, joined:
                    base = training.loss(batch)
                loss = base + self._penalty(factored, weights, features, wanted)
                steps += 1
                _check_finite(loss, steps)
                # Not backward(): the head is open too, and must not gather gradients.
                found = torch.autograd.grad(loss * scale, parameters)
                for parameter, gradient in zip(parameters, found, strict=True):
                    parameter.grad = gradient / scale
                optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return steps

    def _penalty(
        self,
        factored: Mapping[str, FactoredLinear],
        weights: Mapping[str, Tensor],
        features: Mapping[str, Tensor],
        wanted: Mapping[str, Tensor],
    ) -> Tensor:
        distances, deviations = [], []
        for name, layer in factored.items():
            wide = weights[name].dtype
            distances.append(F.mse_loss(features[name].to(wide), wanted[name].to(wide)))
            deviations.append((weights[name] - layer.b @ layer.a).abs().amax())
        feature, perturbation = torch.stack(distances).mean(), torch.stack(deviations).mean()
        settings = self.settings
        return settings.feature_weight * feature + settings.perturbation_weight * perturbation


def _check_finite(loss: Tensor, number: int) -> None:
    value = float(loss.detach())
    if not math.isfinite(value):
        raise NonFiniteError(
            f"the loss of calibration batch {number} is {value}",
            where="calibration",
            fix="use a smaller method.distill_learning_rate, or look at the data of this batch",
        )


@contextmanager
def _layers(
    model: nn.Module, inside: Mapping[str, nn.Module], outside: Mapping[str, nn.Module]
) -> Iterator[None]:
    """Put layers into the model, and others again afterwards."""
    for name, layer in inside.items():
        model.set_submodule(name, layer)
    try:
        yield
    finally:
        for name, layer in outside.items():
            model.set_submodule(name, layer)


@contextmanager
def _outputs(model: nn.Module, names: Mapping[str, object]) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of these modules in the next forward pass."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> torch.utils.hooks.RemovableHandle:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            found[name] = output

        return model.get_submodule(name).register_forward_hook(hook)

    handles = [keep(name) for name in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
