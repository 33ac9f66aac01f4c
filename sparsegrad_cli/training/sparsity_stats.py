"""Count the parameters that a run changed over all its steps, and map where they lie.

A method that chooses parameters in every step changes more of them over a run than it trains
in one step. The size of its adapter depends on the larger number.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsegrad_cli.methods.implementation import Counts, Method
from sparsegrad_cli.models.targets import Target
from sparsegrad_cli.numerics.selective_optimizer import SelectiveAdamW
from sparsegrad_cli.records.base import Matrix
from sparsegrad_cli.records.run import CountsBlock, SparsityBlock

MAP_SIDE = 24


def with_touched(
    counts: CountsBlock, prepared: Counts, model: nn.Module, optimizer: torch.optim.Optimizer
) -> CountsBlock:
    """Return the counts with ``touched``, of the whole model and of every target.

    Args:
        counts: What is recorded of ``prepared``.
        prepared: What trains.
        model: The model after its last step.
        optimizer: The method's own, not accelerate's wrapper around it.
    """
    touched = [_touched(c.target, c.entries, model, optimizer) for c in prepared.targets]
    total = sum(touched)
    return counts.changed(
        touched=total + prepared.trainable_head + prepared.trainable_rest,
        touched_targets=total,
        targets=[
            target.changed(touched=count)
            for target, count in zip(counts.targets, touched, strict=True)
        ],
    )


def _touched(
    target: Target, entries: int, model: nn.Module, optimizer: torch.optim.Optimizer
) -> int:
    """Return how many parameters of a target were stepped at least once: all, if it is dense."""
    parameter = _selected(target, model, optimizer)
    if parameter is None:
        return entries
    assert isinstance(optimizer, SelectiveAdamW)
    return len(optimizer.touched(parameter))


def _selected(
    target: Target, model: nn.Module, optimizer: torch.optim.Optimizer
) -> nn.Parameter | None:
    """Return the target's parameter of which only some entries are stepped, if it has one."""
    if not isinstance(optimizer, SelectiveAdamW):
        return None
    layer = model.get_submodule(target.name)
    return next((p for p in layer.parameters() if optimizer.selects(p)), None)


def sparsity_map(
    targets: list[Target], model: nn.Module, method: Method, optimizer: torch.optim.Optimizer
) -> SparsityBlock | None:
    """Return where the touched parameters of the middle target lie; None for a dense method."""
    target = targets[len(targets) // 2]
    parameter = _selected(target, model, optimizer)
    if (support := method.support(target)) is not None:
        positions, (rows, columns) = support
        if parameter is not None:  # A vector of the support's values, of which some are stepped.
            assert isinstance(optimizer, SelectiveAdamW)
            positions = positions[optimizer.touched(parameter)]
    elif parameter is not None:
        assert isinstance(optimizer, SelectiveAdamW)
        positions = optimizer.touched(parameter)
        rows, columns = optimizer.shape_of(parameter)
    else:
        return None
    return SparsityBlock(
        target=target.name,
        rows=rows,
        columns=columns,
        map=pooled_share(positions, rows, columns),
    )


def pooled_share(positions: Tensor, rows: int, columns: int, side: int = MAP_SIDE) -> Matrix:
    """Return the share of each block of a matrix that the flat positions cover, to four decimals.

    Row i falls into block floor(i * blocks / rows), with at most ``side`` blocks. Columns likewise.
    """
    down, across = min(rows, side), min(columns, side)
    flat = positions.detach().to("cpu", torch.int64)
    block = (flat // columns) * down // rows * across + (flat % columns) * across // columns
    counts = torch.bincount(block, minlength=down * across).view(down, across)
    heights = torch.bincount(torch.arange(rows) * down // rows, minlength=down)
    widths = torch.bincount(torch.arange(columns) * across // columns, minlength=across)
    shares = counts.double() / (heights[:, None] * widths[None, :])
    found: Matrix = [[round(v, 4) for v in row] for row in shares.tolist()]
    return found
