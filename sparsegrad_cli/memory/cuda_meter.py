"""Memory on a CUDA device: totals from the caching allocator, categories from counted storages."""

from __future__ import annotations

import torch

from sparsegrad_cli.memory.meter import MemoryMeter
from sparsegrad_cli.memory.storage_tracker import Peak


class CudaMeter(MemoryMeter):
    """Peaks are the allocator's; what it holds beyond counted storages is other.

    The allocator does not say what was alive at its peak. The categories are those of the moment
    at which the counted storages peaked, which is the same but for rounding to the allocator's
    blocks and for workspaces that an operation asks for and returns inside itself.

    Args:
        device: a CUDA device; without an index, the current one.
    """

    how = "CUDA caching allocator; categories from live tensor storage"

    def __init__(self, device: torch.device | str = "cuda") -> None:
        device = torch.device(device)
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        super().__init__(device)

    def _reset_allocator(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def _read_allocator(self, peak: Peak) -> None:
        peak.allocated = torch.cuda.max_memory_allocated(self.device)
        peak.reserved = torch.cuda.max_memory_reserved(self.device)
