"""Track which tensor storages are alive, and their categories: weights, gradients and so on."""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sparsegrad_cli.records.environment import rss_bytes
from sparsegrad_cli.records.run import LiveTensor, MemoryCategories, MemoryPhase

CATEGORIES = ("weights", "bases", "gradients", "optimizer_state", "saved_activations", "other")

# If several of these apply to a storage, the first one counts.
_PRECEDENCE = ("bases", "weights", "optimizer_state", "gradients", "saved_activations", "other")
_RANK = {category: -index for index, category in enumerate(_PRECEDENCE)}


@dataclass(frozen=True)
class PhasePeak:
    """The moment of a phase at which the most bytes were alive.

    Attributes:
        peak_bytes: bytes alive at that moment: the sum of ``categories``.
        categories: bytes by category at that moment.
        rss_bytes: maximum resident memory of the process, sampled near the peak and at the end.
        reserved_bytes: maximum memory that CUDA's caching allocator held; None on other devices.
        saved_at_end: bytes of saved activations at the end of the phase. After a forward phase,
            these are all that its backward pass needs.
    """

    peak_bytes: int
    categories: dict[str, int]
    rss_bytes: int
    reserved_bytes: int | None
    saved_at_end: int

    def record(self) -> MemoryPhase:
        """Return the peak as a block of run.json."""
        return MemoryPhase(
            peak_bytes=self.peak_bytes,
            categories=MemoryCategories(**self.categories),
            rss_bytes=self.rss_bytes,
            reserved_bytes=self.reserved_bytes,
        )


class Peak:
    """A peak that is still being measured, or whose categories may still be corrected.

    Attributes:
        counted: maximum of counted bytes alive at once.
        categories: bytes by category at that moment.
        clock: the tracker's time at that moment.
        rss: maximum of the sampled resident memory.
        rss_at: counted bytes at the last sample.
        allocated: maximum memory in use by the device's allocator; None if it does not report it.
        reserved: maximum memory held by the device's allocator; None if it does not report it.
        saved_at_end: bytes of saved activations when the phase ended.
    """

    def __init__(self) -> None:
        self.counted = -1
        self.clock = 0
        self.categories = dict.fromkeys(CATEGORIES, 0)
        self.rss = self.rss_at = 0
        self.allocated: int | None = None
        self.reserved: int | None = None
        self.saved_at_end = 0

    @property
    def total(self) -> int:
        """The allocator's peak bytes if it reports them, otherwise the counted ones."""
        return self.counted if self.allocated is None else self.allocated

    def frozen(self) -> PhasePeak:
        """Return the peak as it is now."""
        categories = dict(self.categories)
        # The allocator also counts rounding and workspaces, which no operation shows.
        categories["other"] += self.total - self.counted
        return PhasePeak(self.total, categories, self.rss, self.reserved, self.saved_at_end)

    def keep_larger(self, before: Peak) -> Peak:
        """Return the larger peak of a repeated phase, with the maxima of its other values."""
        kept = self if self.total > before.total else before
        kept.rss = max(self.rss, before.rss)
        kept.saved_at_end = max(self.saved_at_end, before.saved_at_end)
        if self.reserved is not None and before.reserved is not None:
            kept.reserved = max(self.reserved, before.reserved)
        return kept


class Entry(weakref.ref[torch.UntypedStorage]):
    """A live storage, as a weak reference to it.

    torch keeps the Python object of a storage until the storage is freed, even if only C++ holds
    it. The weak reference is therefore cleared exactly when the memory is freed, and the object's
    id identifies the storage until then.

    Attributes:
        category: one of ``CATEGORIES``.
        key: id of the storage.
        nbytes: size in bytes.
        saves: number of saved tensors of autograd that use the storage.
        since: time from which on later labels correct earlier peaks.
        location: ``StorageTracker.location`` when it was first seen.
        shape: shape of the largest tensor seen on it.
        dtype: dtype of that tensor.
    """

    __slots__ = ("category", "dtype", "key", "location", "nbytes", "saves", "shape", "since")
    category: str
    key: int
    nbytes: int
    saves: int
    since: int
    location: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None


class StorageTracker:
    """Live storages of a device, their categories and running sums.

    Args:
        device: without an index, storages on every device of its type count.

    Attributes:
        bytes: bytes alive by category; call ``drop_freed`` first.
        open: the peak of the open phase; None outside a phase.
        kept: peaks of finished phases, by name.
        location: name of the running module, set by the caller; new storages keep it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.bytes = dict.fromkeys(CATEGORIES, 0)
        self.open: Peak | None = None
        self.kept: dict[str, Peak] = {}
        self.location = ""
        self._entries: dict[int, Entry] = {}
        # Storages can be freed at any point, also inside this class. They wait here to be dropped.
        self._freed: deque[Entry] = deque()
        self._clock = 0

    def __len__(self) -> int:
        self.drop_freed()
        return len(self._entries)

    def entries(self) -> list[Entry]:
        """Return all live storages, largest first."""
        self.drop_freed()
        return sorted(self._entries.values(), key=lambda entry: -entry.nbytes)

    def drop_freed(self) -> None:
        """Subtract freed storages from the sums."""
        while self._freed:
            entry = self._freed.popleft()
            self.bytes[entry.category] -= entry.nbytes
            del self._entries[entry.key]

    def refresh(self) -> None:
        """Account for storages that were freed or resized while nothing was intercepted."""
        self.drop_freed()
        for entry in list(self._entries.values()):
            storage = entry()
            if storage is not None:
                self._track(storage)

    def track(self, tensor: Tensor, category: str = "other") -> list[Entry]:
        """Count a tensor's storages, as ``category`` if it outranks their current category."""
        entries = [self._track(s) for s in storages_of(tensor) if self._counts(s.device)]
        for entry in entries:
            self._label(entry, category)
            if entry.dtype is None or tensor.numel() > math.prod(entry.shape):
                entry.shape, entry.dtype = tuple(tensor.shape), tensor.dtype
        return entries

    def _counts(self, device: torch.device) -> bool:
        return device.type == self._device.type and self._device.index in (None, device.index)

    def _track(self, storage: torch.UntypedStorage) -> Entry:
        self.drop_freed()  # First, because this id may belong to a freed storage.
        key, nbytes = id(storage), storage.nbytes()
        entry = self._entries.get(key)
        if entry is None:
            entry = Entry(storage, self._freed.append)
            entry.category, entry.key, entry.nbytes, entry.saves = "other", key, 0, 0
            entry.location, entry.shape, entry.dtype = self.location, (), None
            entry.since = self._tick()
            self._entries[key] = entry
        if nbytes != entry.nbytes:
            self.bytes[entry.category] += nbytes - entry.nbytes
            entry.nbytes, entry.since = nbytes, self._tick()
            self.note_peak()
        return entry

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def note_peak(self) -> None:
        """Record this moment if more bytes are alive than before in this phase."""
        total, peak = sum(self.bytes.values()), self.open
        if peak is None or total <= peak.counted:
            return
        peak.counted, peak.clock, peak.categories = total, self._clock, dict(self.bytes)
        if total > 1.05 * peak.rss_at:  # Asking the OS at every new peak is slow.
            peak.rss, peak.rss_at = max(peak.rss, rss_bytes()), total

    def _label(self, entry: Entry, category: str) -> None:
        """Move a storage to a category of higher rank, in the sums and in the peaks so far."""
        if _RANK[category] <= _RANK[entry.category]:
            return
        peaks = [self.open, *self.kept.values()]
        seen = [p.categories for p in peaks if p is not None and p.clock >= entry.since]
        for sums in (self.bytes, *seen):
            sums[entry.category] -= entry.nbytes
            sums[category] += entry.nbytes
        entry.category = category

    def hold(self, tensor: Tensor) -> list[Entry]:
        """Count a tensor that autograd saves for the backward pass."""
        entries = self.track(tensor, "saved_activations")
        for entry in entries:
            entry.saves += 1
        return entries

    def release(self, entries: list[Entry]) -> None:
        """Count storages as ``other`` from now on if autograd no longer needs them."""
        for entry in entries:
            entry.saves -= 1
            if entry.saves == 0 and entry.category == "saved_activations":
                self.bytes["saved_activations"] -= entry.nbytes
                self.bytes["other"] += entry.nbytes
                entry.category, entry.since = "other", self._tick()


def storages_of(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """Yield a tensor's storages; of a sparse tensor or a wrapper, those of the tensors inside."""
    if is_traceable_wrapper_subclass(tensor):
        parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        for part in parts:
            if isinstance(part, Tensor):  # A shard also holds its device mesh.
                yield from storages_of(part)
    elif tensor.layout is torch.strided:
        try:
            yield tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # The tensor has no memory of its own.
            return
    elif tensor.layout is torch.sparse_coo:
        yield from storages_of(tensor._indices())
        yield from storages_of(tensor._values())
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        for part in (tensor.crow_indices(), tensor.col_indices(), tensor.values()):
            yield from storages_of(part)
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        for part in (tensor.ccol_indices(), tensor.row_indices(), tensor.values()):
            yield from storages_of(part)


def largest(
    tracker: StorageTracker,
    models: Iterable[nn.Module],
    optimizers: Iterable[Optimizer],
    count: int,
) -> list[LiveTensor]:
    """Return the ``count`` largest live storages, largest first.

    A storage is named after the parameter whose value, gradient or optimizer state it holds. Any
    other is named after the module that was running when it was first seen.
    """
    owners = _owners(models, optimizers)
    return [
        LiveTensor(
            bytes=entry.nbytes,
            category=entry.category,
            shape=list(entry.shape),
            dtype=str(entry.dtype).removeprefix("torch."),
            of=owners.get(entry.key, entry.location),
        )
        for entry in tracker.entries()[:count]
    ]


def _owners(models: Iterable[nn.Module], optimizers: Iterable[Optimizer]) -> dict[int, str]:
    """Return key of a storage -> name of its parameter, with the key of optimizer state."""
    found: dict[int, str] = {}
    names: dict[int, str] = {}

    def add(tensor: Tensor, name: str) -> None:
        for storage in storages_of(tensor):
            found.setdefault(id(storage), name)

    for model in models:
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            names[id(tensor)] = name
            add(tensor, name)
            if tensor.grad is not None:
                add(tensor.grad, name)
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    add(value, f"{names.get(id(parameter), 'a parameter')}, {key}")
    return found
