"""Seconds and bytes of finding a basis: stacking gradients and SVD, against streaming them.

python -m benchmarks.calibration --out docs/results/calibration.json

One layer kind of BERT-base (3072 x 768) gives 30 steps x 12 blocks = 360 gradients. The naive way
runs on a stack that fits into memory, and its time is scaled by the number of operations: an SVD
with both factors of an m x n matrix, m <= n, takes 6 n m^2 + 20 m^3 (R-SVD; Golub & Van Loan,
Matrix Computations, 4th ed., fig. 8.6.1). The streaming ways run on the same number of gradients.
Their time per gradient is multiplied by 360, and the time of the eigenvectors is added once. No
time includes the backward passes that compute the gradients.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import save
from sparsegrad_cli.numerics.hosvd import GramStream, SequentialStream, Stream
from sparsegrad_cli.numerics.sketch import SketchStream


def svd_operations(out_features: int, in_features: int, count: int) -> float:
    """Return the operations of the SVDs of both unfoldings of ``count`` stacked gradients."""

    def one(rows: int, columns: int) -> float:
        short, long = sorted((rows, columns))
        return 6.0 * long * short**2 + 20.0 * short**3

    return one(out_features, in_features * count) + one(in_features, out_features * count)


def seconds_of(call: Callable[[], object]) -> float:
    """Return the wall time of one call in seconds."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def stacked(grads: list[Tensor]) -> None:
    """Compute the HOSVD naively: unfold the stack along each mode and take the SVD."""
    stack = torch.stack(grads)  # (t, out, in)
    torch.linalg.svd(stack.permute(1, 2, 0).flatten(1), full_matrices=False)  # (out, in t)
    torch.linalg.svd(stack.permute(2, 1, 0).flatten(1), full_matrices=False)  # (in, out t)


def _add(stream: Stream, grads: list[Tensor]) -> None:
    for grad in grads:
        stream.add(grad)


def streamed(make: Callable[[], Stream], grads: list[Tensor]) -> tuple[float, float, int]:
    """Return (seconds per gradient over all passes, seconds of the eigenvectors, peak bytes)."""
    stream = make()
    adding = finding = 0.0
    held = 0
    for number in range(stream.passes):
        if number:
            finding += seconds_of(stream.next_pass)
        adding += seconds_of(lambda: _add(stream, grads))
        held = max(held, stream.nbytes())
    finding += seconds_of(stream.basis)
    return adding / len(grads), finding, held


def main() -> None:
    """Parse the arguments, measure each way in turn and save the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out-features", type=int, default=3072)
    parser.add_argument("--in-features", type=int, default=768)
    parser.add_argument("--gradients", type=int, default=360)
    parser.add_argument("--held", type=int, default=4, help="gradients that are really made")
    parser.add_argument("--rank", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    shape = (options.out_features, options.in_features)
    torch.manual_seed(0)
    decay = torch.logspace(0, -3, options.in_features)
    grads = [torch.randn(shape) * decay for _ in range(options.held)]
    rank = options.rank
    ways: dict[str, Callable[[], Stream]] = {
        "exact": lambda: GramStream(*shape),
        "sequential": lambda: SequentialStream(*shape, rank=rank),
        "randomized": lambda: SketchStream(*shape, rank=rank),
        "randomized, one power step": lambda: SketchStream(*shape, rank=rank, power_steps=1),
    }
    scale = svd_operations(*shape, options.gradients) / svd_operations(*shape, options.held)
    naive, found = [], {name: [] for name in ways}  # type: ignore[var-annotated]
    for _ in range(options.rounds):
        naive.append(scale * seconds_of(lambda: stacked(grads)))
        for name, make in ways.items():
            each, once, held = streamed(make, grads)
            found[name].append((options.gradients * each + once, each, once, held))
    stack_bytes = 4 * options.gradients * shape[0] * shape[1]
    rows: dict[str, dict[str, Any]] = {
        "stacked SVD": {
            "seconds": statistics.median(naive),
            "times_faster": 1.0,
            "held_bytes": stack_bytes,
            "scaled_by_operations": scale,
        }
    }
    for name, rounds in found.items():
        ratios = [base / total[0] for base, total in zip(naive, rounds, strict=True)]
        rows[name] = {
            "seconds": statistics.median(total for total, *_ in rounds),
            "seconds_per_gradient": statistics.median(each for _, each, _, _ in rounds),
            "seconds_once": statistics.median(once for *_, once, _ in rounds),
            "times_faster": statistics.median(ratios),
            "times_faster_range": [min(ratios), max(ratios)],
            "held_bytes": rounds[0][3],
        }
    for name, row in rows.items():
        spread = "{:.0f} to {:.0f}".format(*row.get("times_faster_range", (1, 1)))
        print(
            f"{name:28}{row['seconds']:10.1f} s {row['times_faster']:8.1f} x faster ({spread})"
            f"{row['held_bytes'] / 2**20:10.1f} MiB"
        )
    settings = {k: v for k, v in vars(options).items() if k != "out"}
    if options.out:
        save(options.out, "calibration", {"settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
