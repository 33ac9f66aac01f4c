"""The tracker counts storages: shared, resized, sparse, freed, and at reused addresses."""

from __future__ import annotations

import pytest
import torch

from sparsegrad_cli.memory.meter import MemoryMeter, make_meter
from sparsegrad_cli.memory.storage_tracker import Peak, StorageTracker

FLOAT = 4  # bytes


def total(meter: MemoryMeter) -> int:
    return sum(meter.live().values())


def peak_of(meter: MemoryMeter, name: str) -> int:
    peak = meter.peak(name)
    assert peak is not None and sum(peak.categories.values()) == peak.peak_bytes
    return peak.peak_bytes


@pytest.fixture
def meter() -> MemoryMeter:
    return make_meter("cpu")


def test_views_and_in_place_changes_add_nothing(meter: MemoryMeter) -> None:
    x = torch.zeros(10, 10)
    with meter.phase("forward"):
        view = x.t()[2:]
        view.add_(1)
        x.mul_(2)
        part = x[0].detach()
        assert total(meter) == 100 * FLOAT and meter.tracked() == 1
    assert peak_of(meter, "forward") == meter.live()["other"] == 100 * FLOAT
    assert part.sum() == 2 * 8


def test_freeing_lowers_live_bytes_but_not_the_peak(meter: MemoryMeter) -> None:
    with meter.phase("forward"):
        first = torch.zeros(100)
        second = torch.zeros(50)
        assert total(meter) == 150 * FLOAT
        del first
        assert total(meter) == 50 * FLOAT
        third = torch.zeros(60)
    assert peak_of(meter, "forward") == 150 * FLOAT
    assert total(meter) == second.nbytes + third.nbytes
    del second, third
    assert total(meter) == 0 and meter.tracked() == 0


def test_small_view_keeps_the_whole_storage(meter: MemoryMeter) -> None:
    with meter.phase("forward"):
        small = torch.zeros(100)[:1]
    assert total(meter) == 100 * FLOAT
    del small
    assert total(meter) == 0


def test_resized_storage(meter: MemoryMeter) -> None:
    with meter.phase("forward"):
        x = torch.zeros(10)
        x.resize_(100)
        assert total(meter) == 100 * FLOAT
        x.untyped_storage().resize_(0)
        y = x.detach()
        assert total(meter) == 0
    x.untyped_storage().resize_(40)  # outside interception
    with meter.phase("backward"):
        pass
    assert peak_of(meter, "backward") == 40
    assert y.untyped_storage().nbytes() == 40


def test_sparse_tensors_count_parts_and_meta_tensors_nothing(meter: MemoryMeter) -> None:
    with meter.phase("forward"):
        indices, values = torch.tensor([[0, 1], [1, 0]]), torch.ones(2)
        sparse = torch.sparse_coo_tensor(indices, values, (1000, 1000), check_invariants=True)
        ghost = torch.empty(10**9, device="meta") + 1
        product = torch.sparse.mm(sparse, torch.ones(1000, 1))
    kept = indices.nbytes + values.nbytes + product.nbytes
    assert total(meter) >= kept
    assert peak_of(meter, "forward") < 10**6
    assert ghost.numel() == 10**9


def test_reused_address_is_another_storage() -> None:
    tracker = StorageTracker(torch.device("cpu"))
    for size in range(1, 200):  # each is freed before the next, mostly at the same address
        tracker.track(torch.zeros(size), "weights")
    tracker.drop_freed()
    assert len(tracker) == 0 and not any(tracker.bytes.values())


def test_label_applies_since_the_storage_was_made() -> None:
    tracker = StorageTracker(torch.device("cpu"))
    tracker.open = peak = Peak()
    early, late = torch.zeros(100), torch.zeros(10)
    tracker.track(early)
    assert peak.categories["other"] == early.nbytes
    big = torch.zeros(50)
    tracker.track(big)
    del big
    tracker.track(late)  # seen after the peak: 110 floats are live, 150 were
    tracker.track(late, "optimizer_state")
    tracker.track(early, "gradients")
    assert peak.counted == 150 * FLOAT
    assert peak.categories["optimizer_state"] == 0
    assert peak.categories["gradients"] == early.nbytes
    assert peak.categories["other"] == 50 * FLOAT
    assert tracker.bytes["optimizer_state"] == late.nbytes


def test_labels_become_more_specific_only() -> None:
    tracker = StorageTracker(torch.device("cpu"))
    x = torch.zeros(10)
    for category in ("saved_activations", "weights", "gradients", "other", "bases", "weights"):
        tracker.track(x, category)
    assert tracker.bytes["bases"] == x.nbytes == sum(tracker.bytes.values())


def test_storage_saved_twice_counts_once() -> None:
    tracker = StorageTracker(torch.device("cpu"))
    x = torch.zeros(10)
    saved = {**dict.fromkeys(tracker.bytes, 0), "saved_activations": x.nbytes}
    other = {**dict.fromkeys(tracker.bytes, 0), "other": x.nbytes}
    for name in ("forward", "backward"):  # the second pass is over the same batch
        tracker.open = Peak()
        tracker.note_peak()
        first, second = tracker.hold(x), tracker.hold(x)
        assert tracker.bytes == saved
        tracker.release(first)
        assert tracker.bytes == saved
        tracker.release(second)
        assert tracker.bytes == other
        tracker.kept[name] = tracker.open
    assert tracker.kept["forward"].categories == tracker.kept["backward"].categories == saved


def test_label_does_not_change_a_peak_of_another_size() -> None:
    tracker = StorageTracker(torch.device("cpu"))
    tracker.open = peak = Peak()
    x = torch.zeros(100)
    tracker.track(x)
    x.untyped_storage().resize_(10 * FLOAT)
    tracker.track(x)
    tracker.track(x, "gradients")
    assert tracker.bytes["gradients"] == sum(tracker.bytes.values()) == 10 * FLOAT
    assert peak.categories["other"] == peak.counted == 100 * FLOAT
