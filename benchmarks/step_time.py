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
from sparsegrad_cli.data.spec import GLUE_TASKS
from sparsegrad_cli.methods.table import make_method
from sparsegrad_cli.modeling.loading import load_classifier
from sparsegrad_cli.modeling.targets import Target, find_targets
from sparsegrad_cli.numerics.hosvd import Basis, by_columns
from sparsegrad_cli.recipe.schema import (
    FullMethod,
    LoraMethod,
    MepropMethod,
    ModelSection,
    SparsegradMethod,
    TargetsSection,
    TrainSection,
)


def random_bases(targets: list[Target]) -> dict[str, Basis]:
    """Orthonormal bases of the right shapes: time does not depend on their content."""

    def square(size: int) -> torch.Tensor:
        return by_columns(torch.linalg.qr(torch.randn(size, size)).Q)

    return {
        t.name: Basis(
            square(t.out_features),
            square(t.in_features),
            torch.linspace(1, 0, t.out_features),
            torch.linspace(1, 0, t.in_features),
        )
        for t in targets
    }


def step_of(
    method: object, model: nn.Module, targets: list[Target], bases: dict[str, Basis], batch: dict
) -> Callable[[], None]:
    """A closure that makes one training step."""
    tuned = make_method(method)  # type: ignore[arg-type]
    tuned.prepare(model, targets, scope="head", bases=bases)
    optimizer = tuned.optimizer(model, TrainSection())
    model.train()

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main() -> None:
    """Parse, measure, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="builtin:minilm")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--rank", type=int, default=128, help="of the core form")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = load_classifier(ModelSection(name=options.model), GLUE_TASKS["cola"], seed=0)
    targets = find_targets(model, TargetsSection())
    bases = random_bases(targets)
    ids = torch.randint(5, 1000, (options.batch, options.length))
    batch = {"input_ids": ids, "labels": ids[:, 0] % 2}
    density = options.density
    methods = {
        "lora": LoraMethod(name="lora", density=density),
        "full": FullMethod(name="full"),
        "meprop entries": MepropMethod(name="meprop", density=density),
        "sparsegrad materialized": SparsegradMethod(name="sparsegrad", density=density),
        "sparsegrad core": SparsegradMethod(
            name="sparsegrad", density=density, form="core", support="static", rank=options.rank
        ),
        "sparsegrad rotated": SparsegradMethod(name="sparsegrad", density=density, form="rotated"),
    }
    sides = {
        name: step_of(method, copy.deepcopy(model), targets, bases, batch)
        for name, method in methods.items()
    }
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
