"""Measure peak memory by phase and category, by counting live tensor storages.

The meter counts every storage on its device that an operation reads or writes while a phase is
open. A storage counts once, however many views it has, from its first use until it is freed. The
tensors that the meter watches count from the start of a phase. Sizes are those of whole storages,
because a small view keeps the whole storage alive. The meter does not see scratch space that an
operation allocates and frees itself, operations on other threads, or memory outside tensors. The
report therefore states the resident memory (RSS) as well.

A storage has its final category from its allocation on. For example, a gradient counts as one
before it arrives in ``.grad``, and optimizer state counts before the optimizer stores it. Saved
activations are the exception: a storage is one only while autograd keeps it for the backward pass.
Afterwards it is ``other``, like temporary tensors, inputs and logits.

The same program gives the same figures. Garbage is collected before a phase and not during it, so
a reference cycle counts as alive until the phase ends. Random state, values and the order of
operations do not change. Without an open phase nothing is intercepted. While a phase is open,
autograd does not notice an in-place change of a tensor that the backward pass needs.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from sparsegrad_cli.memory.storage_tracker import (
    CATEGORIES,
    Entry,
    Peak,
    PhasePeak,
    StorageTracker,
    largest,
)
from sparsegrad_cli.models.module_trace import tensors_in
from sparsegrad_cli.models.sharded_tensors import split_modules
from sparsegrad_cli.numerics import saved_activations
from sparsegrad_cli.records.environment import rss_bytes
from sparsegrad_cli.records.run import LiveTensor, MemoryBlock

__all__ = ["CATEGORIES", "PHASES", "MemoryMeter", "PhasePeak", "make_meter"]

PHASES = ("load", "calibrate", "energy", "forward", "backward", "optimizer", "evaluate")


class _Saved:
    """The object that autograd keeps for a saved tensor; freed with the node that saved it."""

    __slots__ = ("entries", "tensor", "tracker")

    def __init__(self, tracker: StorageTracker, tensor: Tensor) -> None:
        self.tracker = tracker
        self.entries: list[Entry] = []
        # Detached, because a reference to the node's own output would make a cycle with the node.
        self.tensor = tensor.detach()
        self.entries = tracker.hold(self.tensor)

    def __del__(self) -> None:
        self.tracker.release(self.entries)


class _Counter(TorchDispatchMode):
    """Pass every input and output of an operation to the tracker."""

    supports_higher_order_operators = True

    def __init__(self, tracker: StorageTracker) -> None:
        super().__init__()
        self._tracker = tracker

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if _resizes_storage(func):
            self._tracker.refresh()
        out = func(*args, **(kwargs or {}))
        # Inputs are tracked after the call: they are still alive, and some may have been resized.
        for tensor in tensors_in((args, kwargs, out)):
            self._tracker.track(tensor)
        return out


class MemoryMeter:
    """Measure phases of a program; the module's docstring says what is counted.

    Args:
        device: storages on this device count; without an index, on all of its type.
    """

    how = "live tensor storage counted as operations dispatch"

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._tracker = StorageTracker(self.device)
        self._models: list[weakref.ref[nn.Module]] = []
        self._optimizers: list[weakref.ref[Optimizer]] = []

    def watch(
        self,
        model: nn.Module,
        *,
        weights: Iterable[Tensor] = (),
        bases: Iterable[Tensor] = (),
        optimizer: Optimizer | None = None,
    ) -> None:
        """Set the categories of tensors. None is kept alive. Call it again to add more tensors.

        Args:
            model: its parameters and buffers are weights, and their ``.grad`` are gradients. They
                are looked up again in each phase, so modules may be replaced.
            weights: further tensors that belong to the weights, such as quantization scales.
            bases: tensors of bases, even if they are buffers of the model.
            optimizer: all tensors in its ``state``, now and later, are optimizer state.
        """
        if not any(known() is model for known in self._models):
            self._models.append(weakref.ref(model))
        if optimizer is not None and not any(known() is optimizer for known in self._optimizers):
            self._optimizers.append(weakref.ref(optimizer))
        for tensor in weights:
            self._tracker.track(tensor, "weights")
        for tensor in bases:
            self._tracker.track(tensor, "bases")
        self._track_watched()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what happens inside. The larger peak of a repeated phase is kept.

        Raises:
            ValueError: the name is not one of ``PHASES``.
            RuntimeError: another phase is open.
        """
        if name not in PHASES:
            raise ValueError(f"unknown phase {name!r}; one of {', '.join(PHASES)}")
        if self._tracker.open is not None:
            raise RuntimeError(f"phase {name!r} inside another phase")
        gc.collect()
        with ExitStack() as stack:
            if gc.isenabled():
                gc.disable()
                stack.callback(gc.enable)
            self._begin()
            stack.callback(self._end, name)
            for parameter in self._parameters():
                if parameter.requires_grad:
                    stack.callback(self._label_gradients(parameter))
            stack.enter_context(_gathers_as_weights(self._known_models(), self._tracker))
            stack.enter_context(saved_tensors_hooks(self._pack, _unpack))
            stack.enter_context(saved_activations.kept_by(self._pack))
            stack.enter_context(_Counter(self._tracker))
            yield

    def _begin(self) -> None:
        self._tracker.refresh()
        self._track_watched()
        self._reset_allocator()
        self._tracker.open = Peak()
        self._tracker.note_peak()

    def _end(self, name: str) -> None:
        tracker = self._tracker
        try:
            self._track_watched()
            tracker.drop_freed()
            peak = tracker.open
            assert peak is not None
            peak.saved_at_end = tracker.bytes["saved_activations"]
            peak.rss = max(peak.rss, rss_bytes())
            self._read_allocator(peak)
            before = tracker.kept.get(name)
            tracker.kept[name] = peak if before is None else peak.keep_larger(before)
        finally:
            tracker.open = None

    def _reset_allocator(self) -> None:
        """Reset the peak of the device's allocator, if it keeps one."""

    def _read_allocator(self, peak: Peak) -> None:
        """Take the figures of the device's allocator, if it keeps them."""

    def _known_models(self) -> list[nn.Module]:
        return [model for known in self._models if (model := known()) is not None]

    def _parameters(self) -> Iterator[nn.Parameter]:
        for model in self._known_models():
            yield from model.parameters()

    def _track_watched(self) -> None:
        """Track the watched tensors as they are now."""
        for model in self._known_models():
            for buffer in model.buffers():
                self._tracker.track(buffer, "weights")
        for parameter in self._parameters():
            self._tracker.track(parameter, "weights")
            if parameter.grad is not None:
                self._tracker.track(parameter.grad, "gradients")
        for owner in self._optimizers:
            optimizer = owner()
            for tensor in tensors_in(optimizer.state) if optimizer is not None else ():
                self._tracker.track(tensor, "optimizer_state")

    def _label_gradients(self, parameter: nn.Parameter) -> Callable[[], None]:
        """Label a gradient when it arrives, and autograd's copy of it; return the undo function."""

        def arrives(grad: Tensor) -> None:
            self._tracker.track(grad, "gradients")

        def arrived(owner: Tensor) -> None:
            if owner.grad is not None:
                self._tracker.track(owner.grad, "gradients")

        handles = (
            parameter.register_hook(arrives),
            parameter.register_post_accumulate_grad_hook(arrived),
        )

        def remove() -> None:
            for handle in handles:
                handle.remove()

        return remove

    def _pack(self, tensor: Tensor) -> _Saved:
        return _Saved(self._tracker, tensor)

    def live(self) -> dict[str, int]:
        """Return the bytes by category that are known to be alive now."""
        self._tracker.drop_freed()
        return dict(self._tracker.bytes)

    def set_location(self, location: str) -> None:
        """Set the module name for storages that are allocated from now on."""
        self._tracker.location = location

    def largest(self, count: int) -> list[LiveTensor]:
        """Return the largest storages that are known to be alive now."""
        optimizers = [owner for known in self._optimizers if (owner := known()) is not None]
        return largest(self._tracker, self._known_models(), optimizers, count)

    def tracked(self) -> int:
        """Return the number of live storages that are known."""
        return len(self._tracker)

    def peak(self, phase: str) -> PhasePeak | None:
        """Return the peak of a phase; None if it was not measured."""
        peak = self._tracker.kept.get(phase)
        return None if peak is None else peak.frozen()

    def report(self) -> MemoryBlock:
        """Return the ``memory`` block of run.json, without the shape of the batch."""
        peaks = {name: peak for name in PHASES if (peak := self.peak(name)) is not None}
        highest = max(peaks, key=lambda name: peaks[name].peak_bytes) if peaks else None
        return MemoryBlock(
            device=str(self.device),
            how=self.how,
            peak_bytes=peaks[highest].peak_bytes if highest else 0,
            peak_phase=highest,
            phases={name: peak.record() for name, peak in peaks.items()},
        )


def _unpack(saved: _Saved) -> Tensor:
    return saved.tensor


@contextmanager
def _gathers_as_weights(models: Iterable[nn.Module], tracker: StorageTracker) -> Iterator[None]:
    """Count what FSDP2 modules gather for their forward pass as weights, not as activations.

    Autograd saves gathered weights like any other tensor; only the module knows what they are.
    """

    def track(module: nn.Module, inputs: Any) -> None:
        for parameter in module.parameters():
            tracker.track(parameter, "weights")

    with ExitStack() as stack:
        for model in models:
            for module in split_modules(model):  # Its own hook, which gathers, runs first.
                stack.callback(module.register_forward_pre_hook(track).remove)
        yield


def _resizes_storage(func: Any) -> bool:
    """Return whether an operation belongs to FSDP2, which resizes storages unseen around it."""
    return getattr(func, "namespace", "") == "fsdp"


class CudaMeter(MemoryMeter):
    """Measure with CUDA's caching allocator; its memory beyond counted storages is ``other``.

    The allocator does not say which tensors were alive at its peak. The categories are those at the
    peak of the counted storages. The two peaks differ only by the rounding to allocator blocks and
    by workspaces that an operation allocates and frees itself.

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


def make_meter(device: torch.device | str) -> MemoryMeter:
    """Return the memory meter for a device; on CUDA, it also reads CUDA's allocator."""
    device = torch.device(device)
    if device.type != "cuda":
        return MemoryMeter(device)
    if not torch.cuda.is_available():
        return MemoryMeter("cpu")
    return CudaMeter(device)
