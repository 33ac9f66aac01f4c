"""What MeProp and SparseGrad share: an adapter is the positions that were stepped, with values."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparsegrad_cli.methods.base import load_by_name, trainable_state
from sparsegrad_cli.modeling.targets import Target

_POSITIONS, _VALUES = "positions/", "values/"


def pack_entries(
    model: nn.Module,
    touched: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
    adapted: set[str],
) -> dict[str, Tensor]:
    """Positions (int32) and values of each target's stepped entries, and all else that trains.

    Args:
        touched: target name -> (k,) flat positions.
        values: target name -> the matrix that the positions index.
        adapted: parameter names of the targets, left out of the rest.
    """
    tensors = {name: t for name, t in trainable_state(model).items() if name not in adapted}
    for name, positions in touched.items():
        tensors[_POSITIONS + name] = positions.to(torch.int32).cpu()
        tensors[_VALUES + name] = values[name].reshape(-1)[positions].detach().cpu()
    return tensors


def unpack_entries(
    model: nn.Module, tensors: Mapping[str, Tensor], targets: list[Target]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Load all but the entries by name; return target name -> (positions int64, values).

    Raises:
        KeyError: a target without entries, or a name the model does not have.
    """
    plain = {n: t for n, t in tensors.items() if not n.startswith((_POSITIONS, _VALUES))}
    load_by_name(model, plain)
    return {
        t.name: (tensors[_POSITIONS + t.name].to(torch.int64), tensors[_VALUES + t.name])
        for t in targets
    }
