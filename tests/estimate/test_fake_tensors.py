"""Fake tensors: the values that programs read, and what CUDA kernels save for backward."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsegrad_cli.estimate.fake_tensors import DEVICE, NeedsValues, ShapesOnly, cuda_kernels
from sparsegrad_cli.estimate.largest_size import MOST, largest_batch
from sparsegrad_cli.memory.meter import MemoryMeter
from sparsegrad_cli.numerics.supports import _largest_unsorted, largest_entries

B, H, L, D = 2, 3, 40, 8  # batch, heads, length, head


def test_reads_of_values_return_the_assumed_values() -> None:
    with ShapesOnly():
        x = torch.randn(4, 5)
        mask = x > 0
        assert x.sum().item() == 1 and int(mask.sum()) == 1
        assert bool(mask.all()) and torch.equal(x, 2 * x) and torch.isfinite(x).all()
        assert x[mask].shape == x.masked_select(mask).shape == (20,)
        assert x[mask[:, 0]].shape == (4, 5) and x[mask[:, 0], 2].shape == (4,)
        assert torch.nonzero(x).shape == (20, 2)
        x[mask] = 0.0
        x[mask[:, 0]] = torch.ones(4, 5)
        assert x.index_put((torch.tensor([0, 1]),), torch.ones(2, 5)).shape == (4, 5)
        places, values = torch.zeros(2, 3, dtype=torch.int64), torch.ones(3)
        chosen = torch.sparse_coo_tensor(places, values, (6, 4), check_invariants=False)
        assert torch.sparse.mm(chosen, x).shape == (6, 5)


def test_other_reads_of_values_raise() -> None:
    with ShapesOnly(), pytest.raises(NeedsValues):
        torch.unique(torch.ones(5))


def test_fake_tensors_can_be_reused_and_modules_moved() -> None:
    shapes = ShapesOnly()
    with shapes:
        layer = nn.Linear(3, 3).to("cpu").to(torch.bfloat16)
    random_state = torch.get_rng_state()
    with shapes:
        layer(torch.ones(2, 3, dtype=torch.bfloat16)).sum().backward()
        torch.rand(5)
    assert layer.weight.grad is not None and layer.weight.grad.dtype is torch.bfloat16
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.ones(2).sum() == 2  # outside, tensors are real again


def test_fake_tensors_have_sizes_without_memory() -> None:
    meter = MemoryMeter(DEVICE)
    with ShapesOnly(), meter.phase("forward"):
        huge = torch.zeros(2**50) + 1  # four pebibytes
        assert huge.shape == (2**50,) and meter.live()["other"] == 4 * 2**50
        del huge
        assert meter.live()["other"] == 0


def test_selection_operator_passes_opcheck() -> None:
    torch.library.opcheck(_largest_unsorted, (torch.randn(50).abs(), 7))
    real = largest_entries(torch.randn(30, 40), 12)
    with ShapesOnly():
        fake = largest_entries(torch.randn(30, 40), 12)
    assert fake.shape == real.shape and fake.dtype is real.dtype


# --- CUDA's kernels


def kept(forward: Callable[[Tensor, Tensor, Tensor], Tensor], dtype: torch.dtype) -> int:
    """Return the bytes that autograd saves for three (B, H, L, D) inputs; run backward, too."""
    meter = MemoryMeter(DEVICE)
    with ShapesOnly(), cuda_kernels():
        inputs = [torch.randn(B, H, L, D, dtype=dtype, requires_grad=True) for _ in range(3)]
        with meter.phase("forward"):
            out = forward(*inputs)
        assert out.shape == (B, H, L, D)
        out.sum().backward()
        assert all(x.grad is not None and x.grad.shape == x.shape for x in inputs)
    assert F.dropout(torch.ones(3), 1.0).sum() == 0  # outside, functions are torch's own again
    peak = meter.peak("forward")
    assert peak is not None
    return peak.saved_at_end


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_flash_attention_saves_inputs_output_and_one_number_per_row(dropout: float) -> None:
    bytes_kept = kept(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True),
        torch.bfloat16,
    )
    written = 4 * (2 * B * H * L * D) + 4 * B * H * L
    assert 0 <= bytes_kept - written <= 64  # random state


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_efficient_attention_also_saves_the_mask_as_a_bias(dropout: float) -> None:
    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.ones(B, 1, L, L, dtype=torch.bool)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)

    rows = 32 * -(-L // 32)  # its numbers a row come in blocks of 32
    written = 4 * (4 * B * H * L * D) + 4 * B * H * rows + 4 * B * L * L
    assert 0 <= kept(forward, torch.float32) - written <= 64


def test_shared_heads_in_float32_fall_back_to_plain_products() -> None:
    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True)

    assert kept(forward, torch.float32) >= 4 * B * H * L * L  # the weights


def test_dropout_saves_one_byte_per_value() -> None:
    assert kept(lambda q, k, v: F.dropout(q + k + v, 0.1), torch.float32) == B * H * L * D
    assert kept(lambda q, k, v: F.dropout(q + k + v, 0.1, False), torch.float32) == 0


# --- the largest batch


@pytest.mark.parametrize("seed", range(30))
def test_largest_batch_equals_trying_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    steps = rng.integers(0, 50, 3000) ** (1 + seed % 3)  # flat stretches, and wild ones
    peaks = [int(rng.integers(0, 2000)), *np.cumsum(steps).tolist()]
    peaks = np.maximum.accumulate(peaks).tolist()
    tried: set[int] = set()

    def peak(size: int) -> int:
        tried.add(size)
        return int(peaks[min(size, 3000) - 1]) + 10**9 * (size > 3000)

    room = int(rng.integers(0, peaks[-1]))
    batch, taken = largest_batch(peak, room)
    fitting = [size for size in range(1, 3001) if peaks[size - 1] <= room]
    assert batch == (fitting[-1] if fitting else 0)
    assert taken == peaks[max(batch, 1) - 1]
    assert len(tried) < 30


def test_largest_batch_ends_where_memory_does_not_grow() -> None:
    assert largest_batch(lambda size: 5, 5) == (MOST, 5)
    assert largest_batch(lambda size: 5, 4) == (0, 5)
