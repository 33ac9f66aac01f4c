"""Draw random numbers from a seed without disturbing the global random state."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def generator_of(*numbers: int) -> torch.Generator:
    """Return a generator of the CPU that is seeded by several numbers, each at least 0.

    Other numbers, or the same ones in another order, give an unrelated generator.
    """
    (seed,) = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(seed) >> 1)  # manual_seed takes 63 bits.


@contextmanager
def temporary_seed(seed: int) -> Iterator[None]:
    """Seed torch, numpy and Python inside the context, and restore their states afterwards."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
