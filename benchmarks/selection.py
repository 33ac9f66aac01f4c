"""Seconds of the parts of a materialized SparseGrad step, against the plain way of each.

python -m benchmarks.selection --out docs/results/selection.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.common import interleave, ratios, save
from sparsegrad_cli.numerics.hosvd import Basis, by_columns
from sparsegrad_cli.numerics.rotation import from_core, from_sparse_core, to_core
from sparsegrad_cli.numerics.sizing import count_for_density
from sparsegrad_cli.numerics.supports import largest_entries


def measure(out_features: int, in_features: int, rounds: int) -> dict[str, object]:
    """Measure selecting 1 % of a gradient's entries, and rotating them back, at one shape."""
    grad = torch.randn(out_features, in_features)
    ones = torch.ones(1)
    basis = Basis(
        by_columns(torch.linalg.qr(torch.randn(out_features, out_features)).Q),
        by_columns(torch.linalg.qr(torch.randn(in_features, in_features)).Q),
        ones,
        ones,
    )
    k = count_for_density(0.01, out_features, in_features)
    indices = largest_entries(grad, k)
    values = torch.randn(k)

    def dense_way() -> torch.Tensor:
        core = torch.zeros(out_features * in_features)
        core[indices] = values
        return from_core(core.view(out_features, in_features), basis)

    choice = interleave(
        {
            "torch.topk": lambda: torch.topk(grad.flatten().abs(), k, sorted=False),
            "largest_entries": lambda: largest_entries(grad, k),
        },
        rounds,
    )
    way_back = interleave(
        {"dense": dense_way, "sparse": lambda: from_sparse_core(indices, values, basis)}, rounds
    )
    rotation = interleave({"to_core": lambda: to_core(grad, basis)}, rounds)
    return {
        "shape": [out_features, in_features],
        "choice": ratios(choice, "torch.topk"),
        "way_back": ratios(way_back, "dense"),
        "rotation": ratios(rotation, "to_core"),
    }


def main() -> None:
    """Parse the arguments, measure and save the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = [measure(*shape, options.rounds) for shape in ((1536, 384), (384, 1536), (3072, 768))]
    save(options.out, "selection", {"rows": rows})


if __name__ == "__main__":
    main()
