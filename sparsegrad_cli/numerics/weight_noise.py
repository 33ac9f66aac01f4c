"""Random noise on the weight of a layer, drawn again from a seed wherever it is needed."""

from __future__ import annotations

import torch
from torch import Tensor


# An operator, not a function: torch then knows what shape comes out without the seed's value, and
# a step can run on fake tensors (estimate/fake_tensors.py).
@torch.library.custom_op("sparsegrad::row_noise", mutates_args=())
def row_noise(seed: Tensor, deviations_O: Tensor, columns: int) -> Tensor:
    """Return noise (out, columns) whose row i is normal with standard deviation ``deviations[i]``.

    Args:
        seed: () int64, on the CPU.
        deviations_O: (out,).
        columns: number of columns.
    """
    generator = torch.Generator(deviations_O.device).manual_seed(int(seed))
    shape = (len(deviations_O), columns)
    drawn_OI = torch.empty(shape, dtype=deviations_O.dtype, device=deviations_O.device)
    return drawn_OI.normal_(generator=generator).mul_(deviations_O[:, None])


@row_noise.register_fake
def _(seed: Tensor, deviations_O: Tensor, columns: int) -> Tensor:
    return deviations_O.new_empty(deviations_O.shape[0], columns)


def noise_seed() -> Tensor:
    """Draw a seed for :func:`row_noise` from torch's global generator of the CPU."""
    return torch.randint(2**62, (), device="cpu")
