"""Which entries a run touched: how many over all its steps, and where they lie.

A method that chooses anew in every step touches more entries over a run than it trains at once;
its adapter, and what it may forget, go by the larger number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad_cli.methods.base import Counts
from sparsegrad_cli.methods.optimizer import SelectiveAdamW
from sparsegrad_cli.methods.sparsegrad.core_layers import CoreLinear
from sparsegrad_cli.models.targets import Target

MAP_SIDE = 24


def with_touched(
    counts: dict[str, Any], prepared: Counts, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """The ``counts`` block of run.json with ``touched``, of all and of every target.

    Args:
        counts: ``prepared`` as JSON.
        prepared: what trains.
        model: after its last step.
        optimizer: the method's own, not accelerate's wrapper around it.
    """
    touched = [_touched(c.target, c.entries, model, optimizer) for c in prepared.targets]
    total = sum(touched)
    return {
        **counts,
        "touched": total + prepared.trainable_head + prepared.trainable_rest,
        "touched_targets": total,
        "targets": [
            {**target, "touched": count}
            for target, count in zip(counts["targets"], touched, strict=True)
        ],
    }


def _touched(
    target: Target, entries: int, model: nn.Module, optimizer: torch.optim.Optimizer
) -> int:
    """Entries of a target that were stepped at least once; what always trains, always is."""
    parameter = _selected(target, model, optimizer)
    if parameter is None:
        return entries
    assert isinstance(optimizer, SelectiveAdamW)
    return len(optimizer.touched(parameter))


def _selected(
    target: Target, model: nn.Module, optimizer: torch.optim.Optimizer
) -> nn.Parameter | None:
    """The target's parameter of which only some entries are stepped, if it has one."""
    if not isinstance(optimizer, SelectiveAdamW):
        return None
    layer = model.get_submodule(target.name)
    return next((p for p in layer.parameters(recurse=False) if optimizer.selects(p)), None)


def sparsity_map(
    targets: list[Target], model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any] | None:
    """Where the touched entries of the middle target lie: the ``sparsity`` block of run.json.

    Returns:
        ``target``; ``rows`` and ``columns`` of the matrix that is sparse (a core, or W); ``map``:
        shares touched (0..1) in at most 24 x 24 blocks of it. None for a method that leaves no
        entry out.
    """
    target = targets[len(targets) // 2]
    layer = model.get_submodule(target.name)
    parameter = _selected(target, model, optimizer)
    if parameter is not None:
        assert isinstance(optimizer, SelectiveAdamW)
        positions = optimizer.touched(parameter)
        rows, columns = optimizer.shape_of(parameter)
    elif isinstance(layer, CoreLinear) and "support" in layer._buffers:
        positions = layer.support
        rows, columns = layer.shape
    else:
        return None
    return {
        "target": target.name,
        "rows": rows,
        "columns": columns,
        "map": pooled_share(positions, rows, columns),
    }


def pooled_share(
    positions: Tensor, rows: int, columns: int, side: int = MAP_SIDE
) -> list[list[float]]:
    """Share of each block of a matrix that is among the flat positions, to four decimals.

    Row i of ``rows`` falls into block floor(i * blocks / rows), blocks being at most ``side``;
    columns likewise.
    """
    down, across = min(rows, side), min(columns, side)
    flat = positions.detach().to("cpu", torch.int64)
    block = (flat // columns) * down // rows * across + (flat % columns) * across // columns
    counts = torch.bincount(block, minlength=down * across).view(down, across)
    heights = torch.bincount(torch.arange(rows) * down // rows, minlength=down)
    widths = torch.bincount(torch.arange(columns) * across // columns, minlength=across)
    shares = counts.double() / (heights[:, None] * widths[None, :])
    found: list[list[float]] = [[round(v, 4) for v in row] for row in shares.tolist()]
    return found
