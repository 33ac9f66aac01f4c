"""The books of the memory meter: which tensor storages are alive, and what they are."""

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

from sparsegrad_cli.records import run as records
from sparsegrad_cli.records.environment import rss_bytes
from sparsegrad_cli.records.run import MemoryCategories, MemoryPhase

CATEGORIES = ("weights", "bases", "gradients", "optimizer_state", "saved_activations", "other")

# What a storage is that could be several things: the first of these.
_PRECEDENCE = ("bases", "weights", "optimizer_state", "gradients", "saved_activations", "other")
_RANK = {category: -index for index, category in enumerate(_PRECEDENCE)}


@dataclass(frozen=True)
class PhasePeak:
    """The moment of a phase at which most was alive.

    Attributes:
        peak_bytes: bytes alive then; the sum of ``categories``.
        categories: bytes by category at that moment.
        rss_bytes: resident memory of the process, the most seen near the peak and at the end.
        reserved_bytes: what CUDA's caching allocator held at most; None on other devices.
        saved_at_end: saved activations when the phase ended; of a forward phase, all that its
            backward needs.
    """

    peak_bytes: int
    categories: dict[str, int]
    rss_bytes: int
    reserved_bytes: int | None
    saved_at_end: int

    def record(self) -> MemoryPhase:
        """Return the peak as run.json keeps it."""
        return MemoryPhase(
            peak_bytes=self.peak_bytes,
            categories=MemoryCategories(**self.categories),
            rss_bytes=self.rss_bytes,
            reserved_bytes=self.reserved_bytes,
        )


class Peak:
    """A peak that is still being measured, or that a later label may yet correct.

    Attributes:
        counted: most bytes alive at once, by count; ``categories`` are those of that moment.
        clock: the ledger's time of that moment.
        rss: resident memory, sampled; ``rss_at``: what was counted at the last sample.
        allocated: the most the device's allocator had given out, where it says.
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
        """Peak bytes: the allocator's word, or the count."""
        return self.counted if self.allocated is None else self.allocated

    def frozen(self) -> PhasePeak:
        """As it stands now."""
        categories = dict(self.categories)
        # The allocator also sees what no operation shows (rounding, workspaces): that is other.
        categories["other"] += self.total - self.counted
        return PhasePeak(self.total, categories, self.rss, self.reserved, self.saved_at_end)

    def keep_larger(self, before: Peak) -> Peak:
        """Of a phase that is repeated: the larger peak, and the most of what is beside it."""
        kept = self if self.total > before.total else before
        kept.rss = max(self.rss, before.rss)
        kept.saved_at_end = max(self.saved_at_end, before.saved_at_end)
        if self.reserved is not None and before.reserved is not None:
            kept.reserved = max(self.reserved, before.reserved)
        return kept


class Entry(weakref.ref[torch.UntypedStorage]):
    """A live storage: the weak reference to it is its own record.

    torch keeps the python object of a storage for as long as the storage lives, also when only
    C++ holds it, so the reference dies exactly when the memory is freed.
    """

    __slots__ = ("category", "dtype", "key", "nbytes", "place", "saves", "shape", "since")
    category: str
    key: int
    nbytes: int
    saves: int  # how many saved tensors of autograd hold it
    since: int  # later labels reach back to peaks from this time on
    place: str  # where it was first seen: Ledger.place
    shape: tuple[int, ...]  # of the largest tensor seen on it
    dtype: torch.dtype | None


class Ledger:
    """Live storages of a device, their categories and the running sums.

    Args:
        device: without an index, storages on every device of its type count.

    Attributes:
        bytes: bytes alive by category; ``bury`` first.
        open: the peak of the phase that is open.
        kept: peaks of phases that are over, by name.
        place: where the program is; whoever knows sets it, new storages are marked with it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.bytes = dict.fromkeys(CATEGORIES, 0)
        self.open: Peak | None = None
        self.kept: dict[str, Peak] = {}
        self.place = ""
        self._entries: dict[int, Entry] = {}
        # Storages die at any point of the program, also inside this class: deaths wait here.
        self._dead: deque[Entry] = deque()
        self._clock = 0

    def __len__(self) -> int:
        self.bury()
        return len(self._entries)

    def entries(self) -> list[Entry]:
        """All live storages, the largest first."""
        self.bury()
        return sorted(self._entries.values(), key=lambda entry: -entry.nbytes)

    def bury(self) -> None:
        """Take what died out of the sums."""
        while self._dead:
            entry = self._dead.popleft()
            self.bytes[entry.category] -= entry.nbytes
            del self._entries[entry.key]

    def refresh(self) -> None:
        """Deaths and sizes that changed while nothing was intercepted."""
        self.bury()
        for entry in list(self._entries.values()):
            storage = entry()
            if storage is not None:
                self._touch(storage)

    def touch(self, tensor: Tensor, category: str = "other") -> list[Entry]:
        """Count a tensor's storages, as ``category`` if that says more than what is known."""
        entries = [self._touch(s) for s in storages_of(tensor) if self._ours(s.device)]
        for entry in entries:
            self._label(entry, category)
            if entry.dtype is None or tensor.numel() > math.prod(entry.shape):
                entry.shape, entry.dtype = tuple(tensor.shape), tensor.dtype
        return entries

    def _ours(self, device: torch.device) -> bool:
        return device.type == self._device.type and self._device.index in (None, device.index)

    def _touch(self, storage: torch.UntypedStorage) -> Entry:
        self.bury()  # first: this storage may lie at the address of one that died
        key, nbytes = id(storage), storage.nbytes()
        entry = self._entries.get(key)
        if entry is None:
            entry = Entry(storage, self._dead.append)
            entry.category, entry.key, entry.nbytes, entry.saves = "other", key, 0, 0
            entry.place, entry.shape, entry.dtype = self.place, (), None
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
        """If more is alive than ever in this phase, remember the moment."""
        total, peak = sum(self.bytes.values()), self.open
        if peak is None or total <= peak.counted:
            return
        peak.counted, peak.clock, peak.categories = total, self._clock, dict(self.bytes)
        if total > 1.05 * peak.rss_at:  # asking the system at every new peak would be slow
            peak.rss, peak.rss_at = max(peak.rss, rss_bytes()), total

    def _label(self, entry: Entry, category: str) -> None:
        if _RANK[category] <= _RANK[entry.category]:
            return
        peaks = [self.open, *self.kept.values()]
        seen = [p.categories for p in peaks if p is not None and p.clock >= entry.since]
        for sums in (self.bytes, *seen):
            sums[entry.category] -= entry.nbytes
            sums[category] += entry.nbytes
        entry.category = category

    def hold(self, tensor: Tensor) -> list[Entry]:
        """Autograd saves this tensor for backward."""
        entries = self.touch(tensor, "saved_activations")
        for entry in entries:
            entry.saves += 1
        return entries

    def release(self, entries: list[Entry]) -> None:
        """Autograd is done with it. From now on, and not before, it is other."""
        for entry in entries:
            entry.saves -= 1
            if entry.saves == 0 and entry.category == "saved_activations":
                self.bytes["saved_activations"] -= entry.nbytes
                self.bytes["other"] += entry.nbytes
                entry.category, entry.since = "other", self._tick()


def storages_of(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """Storages behind a tensor: of a sparse one its parts', of a wrapper its inner tensors'."""
    if is_traceable_wrapper_subclass(tensor):
        parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        for part in parts:
            if isinstance(part, Tensor):  # a shard names the processes that it is split over, too
                yield from storages_of(part)
    elif tensor.layout is torch.strided:
        try:
            yield tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # a tensor without memory of its own
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


@dataclass(frozen=True)
class LiveTensor:
    """One live storage.

    Attributes:
        nbytes: its bytes.
        category: of memory/storage_tracker.py.
        shape, dtype: of the largest tensor that was seen on it.
        of: the parameter it holds, or holds the gradient or state of; else the module that was
            running when it was first seen; empty where nobody knows.
    """

    nbytes: int
    category: str
    shape: tuple[int, ...]
    dtype: str
    of: str

    def record(self) -> records.LiveTensor:
        """Return the tensor as run.json keeps it."""
        return records.LiveTensor(
            bytes=self.nbytes,
            category=self.category,
            shape=list(self.shape),
            dtype=self.dtype,
            of=self.of,
        )


def largest(
    ledger: Ledger, models: Iterable[nn.Module], optimizers: Iterable[Optimizer], count: int
) -> list[LiveTensor]:
    """The ``count`` largest live storages of the books, largest first."""
    owners = _owners(models, optimizers)
    return [
        LiveTensor(
            entry.nbytes,
            entry.category,
            entry.shape,
            str(entry.dtype).removeprefix("torch."),
            owners.get(entry.key, entry.place),
        )
        for entry in ledger.entries()[:count]
    ]


def _owners(models: Iterable[nn.Module], optimizers: Iterable[Optimizer]) -> dict[int, str]:
    """Key of a storage -> name of its parameter, or of what it is to that parameter."""
    found: dict[int, str] = {}
    names: dict[int, str] = {}

    def enter(tensor: Tensor, name: str) -> None:
        for storage in storages_of(tensor):
            found.setdefault(id(storage), name)

    for model in models:
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            names[id(tensor)] = name
            enter(tensor, name)
            if tensor.grad is not None:
                enter(tensor.grad, name)
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    enter(value, f"{names.get(id(parameter), 'a parameter')}, {key}")
    return found
