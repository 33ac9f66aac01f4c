"""Where the real tokens of a padded batch lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsegrad_cli.numerics.row_attention import RowGroup, row_groups


@dataclass(frozen=True)
class Rows:
    """Where the tokens of a batch lie without padding: row after row, the longest row first.

    Attributes:
        shape: (B, L), rows and tokens of the padded batch.
        places: (T,) place of each real token in the padded batch, counted over its rows.
        starts: (B,) place among the T of the first token of each sorted row.
        ranks: (B,) place of each row of the batch among the sorted rows.
        groups: the sorted rows in groups of like length.
    """

    shape: tuple[int, int]
    places: Tensor
    starts: Tensor
    ranks: Tensor
    groups: list[RowGroup]


def rows_of(mask_BL: Tensor) -> Rows | None:
    """Return where the real tokens lie; None if some row is empty or is not one run of tokens.

    Args:
        mask_BL: attention mask, not 0 at real tokens.
    """
    real_BL = mask_BL != 0
    lengths = real_BL.sum(1).tolist()
    if not lengths or not all(lengths):
        return None
    starts = real_BL.to(torch.int8).argmax(1).tolist()  # The first real token of each row.
    rows = sorted_rows(starts, lengths, mask_BL.shape[1], mask_BL.device)
    return rows if bool(real_BL.flatten()[rows.places].all()) else None


def sorted_rows(
    starts: Sequence[int], lengths: Sequence[int], width: int, device: torch.device
) -> Rows:
    """Return the rows of a batch; row b has ``lengths[b]`` tokens from column ``starts[b]`` on."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    places, row_starts, ranks, token = [], [], [0] * len(order), 0
    for rank, row in enumerate(order):
        start = row * width + starts[row]
        places.append(torch.arange(start, start + lengths[row]))
        row_starts.append(token)
        ranks[row] = rank
        token += lengths[row]
    return Rows(
        (len(order), width),
        torch.cat(places).to(device),
        torch.tensor(row_starts, device=device),
        torch.tensor(ranks, device=device),
        row_groups([lengths[row] for row in order], device),
    )
