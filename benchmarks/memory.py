"""Bytes of a whole training step beyond the frozen weights, counted exactly, by category.

python -m benchmarks.memory --model shapes:bert-base --batch 16 --length 128 --methods lora,core
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import save
from benchmarks.models import batch_of, methods_at, model_of, random_bases
from sparsegrad_cli.memory.meter import MemoryMeter
from sparsegrad_cli.models.memory_savers import save_memory
from sparsegrad_cli.models.targets import find_targets
from sparsegrad_cli.recipe.schema import TargetsSection, TrainSection

MIB = 2**20
COLUMNS = ("gradients", "optimizer_state", "saved_activations", "other", "adapter")
LABELS = ("gradients", "state", "saved", "other", "adapter", "beyond", "ratio", "bases", "entries")


def step_bytes(method: Any, model_name: str, batch: int, length: int) -> dict[str, int]:
    """Return the peak bytes of a method's second step on a new model, by category.

    ``adapter`` holds the parameters that the method added. ``beyond`` holds everything except
    frozen weights and bases.
    """
    model = model_of(model_name)
    frozen = sum(p.numel() * p.element_size() for p in model.parameters())
    targets = find_targets(model, TargetsSection())
    rank = method.basis_rank
    save_memory(model, targets, method.recompute)
    tuned = method.implementation()
    bases = random_bases(targets, rank) if method.calibrates else None
    prepared = tuned.prepare(model, targets, scope="head", bases=bases)
    del bases
    optimizer = tuned.optimizer(model, TrainSection())
    model.train()
    inputs = batch_of(batch, length)
    model(**inputs).loss.backward()  # The first step creates the optimizer's state.
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    meter = MemoryMeter()
    meter.watch(model, bases=prepared.bases, optimizer=optimizer)
    with meter.phase("forward"):
        loss = model(**inputs).loss
    with meter.phase("backward"):
        loss.backward()
    with meter.phase("optimizer"):
        optimizer.step()
    peaks = [peak for name in ("forward", "backward", "optimizer") if (peak := meter.peak(name))]
    top = max(peaks, key=lambda peak: peak.peak_bytes - peak.categories["bases"])
    found = dict(top.categories)
    weights = found.pop("weights")
    found["adapter"] = weights - frozen
    found["beyond"] = sum(v for k, v in found.items() if k != "bases")
    found["trainable"] = prepared.counts.trainable_targets
    found["saved_after_forward"] = peaks[0].saved_at_end
    return found


def main() -> None:
    """Parse the arguments, count the bytes and save the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="shapes:bert-base")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--rank", type=int, default=160, help="of the core form")
    parser.add_argument("--methods", default="lora,core,lora recomputed,core recomputed,full")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    methods = methods_at(options.density, options.rank)
    rows: dict[str, dict[str, Any]] = {}
    for name in options.methods.split(","):
        rows[name] = step_bytes(methods[name], options.model, options.batch, options.length)
    base = rows[next(iter(rows))]
    print(f"{'MiB':16}" + "".join(f"{label:>10}" for label in LABELS))
    for name, row in rows.items():
        row["ratio"] = row["beyond"] / base["beyond"]
        row["ratio_with_bases"] = (row["beyond"] + row["bases"]) / (base["beyond"] + base["bases"])
        cells = [f"{row[c] / MIB:10.1f}" for c in (*COLUMNS, "beyond")]
        cells += [f"{row['ratio']:10.3f}", f"{row['bases'] / MIB:10.1f}", f"{row['trainable']:10}"]
        print(f"{name:16}" + "".join(cells))
    settings = {k: v for k, v in vars(options).items() if k != "out"}
    if options.out:
        save(options.out, "memory", {"settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
