"""One linear layer in float64 that a method changes, and AdamW written out, as a reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from sparsegrad_cli.methods.base import MethodSettings
from sparsegrad_cli.methods.implementation import TrainingData
from sparsegrad_cli.models.targets import Target
from sparsegrad_cli.numerics.seeding import temporary_seed
from sparsegrad_cli.recipe.schema import TrainSection

Parameters = dict[str, Tensor]
TRAIN = TrainSection(learning_rate=0.03, weight_decay=0.1)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return normal numbers; the global random state is not touched."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


class OneLayer:
    """A model of one linear layer, prepared by a method, with a squared loss.

    Args:
        settings: of the method.
        transposed: whether the layer is GPT-2's Conv1D.
        seed: seed of the random numbers that the method draws.
        run: whether a run follows, whose first two batches a method that asks for them reads.
        training: returns the ``TrainingData`` of that run, in place of those.

    Attributes:
        weight_OI, bias_O: W and b, copies.
        start: the parameters of the change before training, by name, copies.
    """

    out, inn = 6, 5

    def __init__(
        self,
        settings: MethodSettings,
        *,
        transposed: bool = False,
        dtype: torch.dtype = torch.float64,
        seed: int = 3,
        run: bool = True,
        training: Callable[[OneLayer], TrainingData] | None = None,
        train: TrainSection = TRAIN,
    ) -> None:
        layer: Any = Conv1D(self.out, self.inn) if transposed else nn.Linear(self.inn, self.out)
        layer.to(dtype)
        self.weight_OI = drawn(self.out, self.inn, seed=1, dtype=dtype)
        self.bias_O = drawn(self.out, seed=2, dtype=dtype)
        layer.weight.data = (self.weight_OI.T if transposed else self.weight_OI).clone()
        layer.bias.data = self.bias_O.clone()
        self.model = nn.ModuleDict({"layer": layer})
        self.target = Target("layer", "layer", 0, self.out, self.inn, transposed)
        self.method = settings.implementation()
        data = training(self) if training else None
        if data is None and run and settings.reads_batches:
            data = TrainingData(3, self._batches, lambda batch: self.loss(**batch))
        with temporary_seed(seed):
            self.prepared = self.method.prepare(
                self.model, [self.target], scope="head", training=data
            )
        self.optimizer = self.method.optimizer(self.model, train)
        self.start = self.parameters()

    @property
    def layer(self) -> Any:
        """The layer, with the method's change."""
        return self.model["layer"]

    def parameters(self) -> Parameters:
        """Return copies of the parameters that train, by their names in the change."""
        change = self.layer.change
        return {n: p.detach().clone() for n, p in change.named_parameters() if p.requires_grad}

    @staticmethod
    def batch(step: int) -> tuple[Tensor, Tensor]:
        """Return inputs (4, in) and desired outputs (4, out) of a step."""
        return drawn(4, OneLayer.inn, seed=10 + step), drawn(4, OneLayer.out, seed=50 + step)

    def _batches(self) -> Iterator[Mapping[str, Tensor]]:
        dtype = self.weight_OI.dtype
        for step in range(2):
            x, wanted = self.batch(step)
            yield {"x": x.to(dtype), "wanted": wanted.to(dtype)}

    def loss(self, x: Tensor, wanted: Tensor) -> Tensor:
        """Return half the squared distance of the outputs to those desired."""
        found: Tensor = self.layer(x)
        return 0.5 * (found - wanted).square().sum()

    def steps(self, count: int) -> None:
        """Take steps of the method's optimizer."""
        for step in range(count):
            self.optimizer.zero_grad()
            self.loss(*self.batch(step)).backward()
            self.optimizer.step()

    def weight_gradient_OI(self, step: int, delta_OI: Tensor) -> Tensor:
        """Return dL/dW of a step at W + D, by hand: (y - wanted)' x."""
        x_NI, wanted_NO = self.batch(step)
        y_NO = F.linear(x_NI, self.weight_OI + delta_OI, self.bias_O)
        return (y_NO - wanted_NO).T @ x_NI  # (out, N) @ (N, in)


class ReferenceAdamW:
    """AdamW (Loshchilov and Hutter 2019, algorithm 2), written out."""

    def __init__(self, parameters: Mapping[str, Tensor], train: TrainSection = TRAIN) -> None:
        self.p = {name: p.clone() for name, p in parameters.items()}
        self.m = {name: torch.zeros_like(p) for name, p in self.p.items()}
        self.v = {name: torch.zeros_like(p) for name, p in self.p.items()}
        self.t, self.train = 0, train

    def step(self, gradients: Mapping[str, Tensor]) -> None:
        """Take one step."""
        self.t += 1
        lr, b1, b2 = self.train.learning_rate, self.train.adam_beta1, self.train.adam_beta2
        for name, g in gradients.items():
            self.m[name] = b1 * self.m[name] + (1 - b1) * g
            self.v[name] = b2 * self.v[name] + (1 - b2) * g * g
            mean, square = self.m[name] / (1 - b1**self.t), self.v[name] / (1 - b2**self.t)
            decayed = self.p[name] * (1 - lr * self.train.weight_decay)
            self.p[name] = decayed - lr * mean / (square.sqrt() + self.train.adam_epsilon)


def _pulled(
    delta_OI: Callable[[Parameters], Tensor],
) -> Callable[[Parameters, Tensor], Parameters]:
    def pull(p: Parameters, g_OI: Tensor) -> Parameters:
        leaves = {name: t.clone().requires_grad_() for name, t in p.items()}
        found = torch.autograd.grad(delta_OI(leaves), list(leaves.values()), g_OI)
        return dict(zip(leaves, found, strict=True))

    return pull


def check_steps(
    one: OneLayer,
    delta_OI: Callable[[Parameters], Tensor],
    pull: Callable[[Parameters, Tensor], Parameters] | None = None,
    *,
    count: int = 4,
) -> None:
    """Check that a method's steps are those of a reference.

    Args:
        one: freshly prepared.
        delta_OI: returns the change D of the parameters, by the paper's formula.
        pull: returns the gradients of the parameters, given dL/dD, by hand; by default, autograd
            finds them from ``delta_OI``.
        count: number of steps.
    """
    reference = ReferenceAdamW(one.start)
    for step in range(count):
        g_OI = one.weight_gradient_OI(step, delta_OI(reference.p))
        reference.step((pull or _pulled(delta_OI))(reference.p, g_OI))
    one.steps(count)
    found = one.parameters()
    assert found.keys() == reference.p.keys()
    for name, expected in reference.p.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-11)
        assert not torch.allclose(expected, one.start[name], atol=1e-4), f"{name} does not move"
    merged_OI = one.method.merged_OI(one.model, one.target)
    expected_OI = one.weight_OI + delta_OI(reference.p)
    torch.testing.assert_close(merged_OI, expected_OI, rtol=1e-9, atol=1e-11)
