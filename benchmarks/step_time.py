"""Seconds of a whole training step (forward, backward, optimizer), all methods in one run.

python -m benchmarks.step_time --batch 16 --length 64 --rounds 15 --out docs/results/step_time.json
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.common import interleave, ratios, save
from benchmarks.models import batch_of, methods_at, model_of, random_bases
from sparsegrad_cli.methods.base import MethodSettings
from sparsegrad_cli.models.memory_savers import save_memory
from sparsegrad_cli.models.targets import Target, find_targets, freeze
from sparsegrad_cli.numerics.hosvd import Basis
from sparsegrad_cli.recipe.schema import TargetsSection, TrainSection

METHODS = (
    "lora",
    "floor",
    "full",
    "meprop entries",
    "core",
    "core recomputed",
    "materialized",
    "rotated",
)


def step_of(
    method: MethodSettings,
    model: nn.Module,
    targets: list[Target],
    bases: dict[str, Basis],
    batch: dict[str, torch.Tensor],
) -> Callable[[], None]:
    """Return a function that runs one training step."""
    save_memory(model, targets, method.recompute)
    tuned = method.implementation()
    tuned.prepare(model, targets, scope="head", bases=bases)
    optimizer = tuned.optimizer(model, TrainSection())
    model.train()

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def floor_of(
    model: nn.Module, targets: list[Target], batch: dict[str, torch.Tensor]
) -> Callable[[], None]:
    """Return a function that runs the cheapest possible step.

    It computes the forward pass and the input gradients through the frozen model, down to the first
    target module.
    """
    freeze(model)
    save_memory(model, targets)
    model.train()

    def wants_gradient(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        return output.detach().requires_grad_()

    model.get_submodule(targets[0].name).register_forward_hook(wants_gradient)

    def step() -> None:
        model(**batch).loss.backward()

    return step


def main() -> None:
    """Parse the arguments, measure and save the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="builtin:minilm")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--rank", type=int, default=160, help="of the core form")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = model_of(options.model)
    targets = find_targets(model, TargetsSection())
    names = options.methods.split(",")
    full_rank = {"materialized", "rotated"} & set(names)
    bases = random_bases(targets, None if full_rank else options.rank)
    batch = batch_of(options.batch, options.length)
    methods = methods_at(options.density, options.rank)
    sides = {}
    for name in names:
        copied = copy.deepcopy(model)
        sides[name] = (
            floor_of(copied, targets, batch)
            if name == "floor"
            else step_of(methods[name], copied, targets, bases, batch)
        )
    table = ratios(interleave(sides, options.rounds), against="lora")
    for name, row in table.items():
        print(
            f"{name:24} {1000 * row['median_s']:8.1f} ms   "
            f"{row['ratio']:.2f} x lora ({row['ratio_q1']:.2f} to {row['ratio_q3']:.2f})"
        )
    settings = {k: v for k, v in vars(options).items() if k != "out"}
    if options.out:
        save(options.out, "step_time", {"settings": settings, "against": "lora", "rows": table})


if __name__ == "__main__":
    main()
