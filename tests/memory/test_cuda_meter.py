"""Memory meter on CUDA: allocated bytes beyond counted storages count as other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsegrad_cli.memory.meter import MemoryMeter, make_meter
from sparsegrad_cli.memory.storage_tracker import Peak


def categories_of(meter: MemoryMeter, name: str) -> dict[str, int]:
    """Return a phase's non-zero categories, and check that they add up."""
    peak = meter.peak(name)
    assert peak is not None and sum(peak.categories.values()) == peak.peak_bytes
    return {k: v for k, v in peak.categories.items() if v}


def parameter_bytes(module: nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())


def test_allocator_overhead_counts_as_other() -> None:
    layer = nn.Linear(6, 8)

    class Rounding(MemoryMeter):
        def _read_allocator(self, peak: Peak) -> None:
            peak.allocated, peak.reserved = 1024, 4096

    meter = Rounding()
    meter.watch(layer)
    with meter.phase("evaluate"):
        pass
    weights = parameter_bytes(layer)
    assert categories_of(meter, "evaluate") == {"weights": weights, "other": 1024 - weights}
    assert meter.report().to_json()["phases"]["evaluate"]["reserved_bytes"] == 4096


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_meter_without_cuda_counts_on_the_cpu() -> None:
    meter = make_meter("cuda:0")
    with meter.phase("forward"):
        x = torch.zeros(10)
    assert categories_of(meter, "forward") == {"other": x.nbytes}
    assert meter.report().to_json()["device"] == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA on this machine")
def test_cuda_categories_and_allocator() -> None:
    layer = nn.Linear(512, 512, device="cuda")
    x = torch.randn(64, 512, device="cuda")
    optimizer = torch.optim.AdamW(layer.parameters())
    meter = make_meter("cuda")
    meter.watch(layer, optimizer=optimizer)
    with meter.phase("forward"):
        loss = layer(x).sum()
    with meter.phase("backward"):
        loss.backward()
    with meter.phase("optimizer"):
        optimizer.step()
    size = parameter_bytes(layer)
    peak = meter.peak("forward")
    assert peak is not None and peak.saved_at_end == x.nbytes
    assert categories_of(meter, "backward")["gradients"] == size
    assert 2 * size <= meter.live()["optimizer_state"] <= 2 * size + 8
    last = meter.peak("optimizer")
    assert last is not None and last.reserved_bytes is not None
    assert last.reserved_bytes >= last.peak_bytes >= 4 * size
    assert last.categories["other"] >= 0
