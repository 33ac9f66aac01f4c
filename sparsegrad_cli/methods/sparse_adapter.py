"""What MeProp and SparseGrad share: an adapter is the positions that were stepped, with values."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparsegrad_cli.methods.base import load_by_name, trainable_state
from sparsegrad_cli.models.targets import Target

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
        ValueError: positions that no adapter of this target can have.
    """
    plain = {n: t for n, t in tensors.items() if not n.startswith((_POSITIONS, _VALUES))}
    found = {t.name: (tensors[_POSITIONS + t.name], tensors[_VALUES + t.name]) for t in targets}
    for target in targets:
        positions, values = found[target.name]
        check_positions(target.name, positions, values, target.size)
    load_by_name(model, plain)
    return {name: (positions.long(), values) for name, (positions, values) in found.items()}


def check_positions(name: str, positions: Tensor, values: Tensor, room: int) -> None:
    """Refuse positions that are not those of ``values`` in a matrix of ``room`` entries.

    An index that is negative or too large would write elsewhere or fail halfway.

    Raises:
        ValueError: says what is wrong.
    """
    if positions.dtype not in (torch.int32, torch.int64) or positions.ndim != 1:
        raise ValueError(f"positions of {name} are no list of whole numbers")
    if positions.shape != values.shape:
        raise ValueError(f"{name} has {len(positions)} positions for {values.numel()} values")
    if not len(positions):
        return
    if int(positions.min()) < 0 or int(positions.max()) >= room:
        raise ValueError(f"positions of {name} lie outside its {room} entries")
    if not bool((positions[1:] > positions[:-1]).all()):
        raise ValueError(f"positions of {name} do not ascend: one may be there twice")
