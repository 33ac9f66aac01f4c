"""Peak memory by phase and category, by counting live tensor storage as operations dispatch.

What is counted: every storage on the meter's device that an operation reads or writes while a phase
is open, once however many views it has, from its first sight to its death; and from the start of a
phase the tensors that the meter was told of (``watch``), touched or not. Sizes are those of whole
storages, which is what a small view keeps alive. What is not: scratch space that an operation
allocates and frees inside itself, operations on other threads, and memory outside tensors; hence
the resident memory (RSS) beside it.

A storage is booked for all its life as what it turns out to be: a gradient already when the
product that makes it is computed, before it arrives in ``.grad``; optimizer state already when it
is allocated, before the optimizer files it. Saved activations are the exception: bytes of the
distinct storages that autograd keeps for backward, and only while it keeps them. They then pass
to ``other``, where transients, inputs and logits are.

The same program gives the same figures: garbage is collected before a phase, the collector is off
during it, so a reference cycle counts as alive until the phase ends, whenever python would have
found it. Random state, values and the order of operations are untouched; with no phase open
nothing is intercepted. An in-place change of a tensor that backward needs, normally an error of
autograd, goes unnoticed while a phase is open.
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
    Ledger,
    LiveTensor,
    Peak,
    PhasePeak,
    largest,
)
from sparsegrad_cli.models.module_trace import tensors_in
from sparsegrad_cli.models.sharded_tensors import split_modules
from sparsegrad_cli.records.environment import rss_bytes
from sparsegrad_cli.records.run import MemoryBlock

__all__ = ["CATEGORIES", "PHASES", "MemoryMeter", "PhasePeak", "make_meter"]

PHASES = ("load", "calibrate", "energy", "forward", "backward", "optimizer", "evaluate")


class _Saved:
    """What autograd holds in place of a saved tensor; dies with the node that saved it."""

    __slots__ = ("entries", "ledger", "tensor")

    def __init__(self, ledger: Ledger, tensor: Tensor) -> None:
        self.ledger = ledger
        self.entries: list[Entry] = []
        # Detached: holding a node's own output would make a cycle with the node.
        self.tensor = tensor.detach()
        self.entries = ledger.hold(self.tensor)

    def __del__(self) -> None:
        self.ledger.release(self.entries)


class _Counter(TorchDispatchMode):
    """Shows the ledger every tensor that an operation takes or gives."""

    supports_higher_order_operators = True

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self._ledger = ledger

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if _resizes_storage(func):
            self._ledger.refresh()
        out = func(*args, **(kwargs or {}))
        # Inputs after the call, too: all are alive still, and some may have been resized.
        for tensor in tensors_in((args, kwargs, out)):
            self._ledger.touch(tensor)
        return out


class MemoryMeter:
    """Measures phases of a program; see the module's text for what is counted.

    Args:
        device: storages on this device count; without an index, on all of its type.
    """

    how = "live tensor storage counted as operations dispatch"

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._ledger = Ledger(self.device)
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
        """Say what tensors are; keeps none of them alive, and may be called again for more.

        Args:
            model: parameters and buffers are weights, ``.grad`` are gradients; looked up again
                in each phase, so modules may be replaced.
            weights: others that belong to them, such as the scales of quantized ones.
            bases: bases, also where they are buffers of the model.
            optimizer: tensors in its ``state``, now and later, are optimizer state.
        """
        if not any(known() is model for known in self._models):
            self._models.append(weakref.ref(model))
        if optimizer is not None and not any(known() is optimizer for known in self._optimizers):
            self._optimizers.append(weakref.ref(optimizer))
        for tensor in weights:
            self._ledger.touch(tensor, "weights")
        for tensor in bases:
            self._ledger.touch(tensor, "bases")
        self._look()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what happens inside. Of a phase that is repeated, the larger peak is kept.

        Raises:
            ValueError: not one of ``PHASES``.
            RuntimeError: inside another phase.
        """
        if name not in PHASES:
            raise ValueError(f"unknown phase {name!r}; one of {', '.join(PHASES)}")
        if self._ledger.open is not None:
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
                    stack.callback(self._hook(parameter))
            stack.enter_context(_gathers_as_weights(self._known_models(), self._ledger))
            stack.enter_context(saved_tensors_hooks(self._pack, _unpack))
            stack.enter_context(_Counter(self._ledger))
            yield

    def _begin(self) -> None:
        self._ledger.refresh()
        self._look()
        self._reset_allocator()
        self._ledger.open = Peak()
        self._ledger.note_peak()

    def _end(self, name: str) -> None:
        ledger = self._ledger
        try:
            self._look()
            ledger.bury()
            peak = ledger.open
            assert peak is not None
            peak.saved_at_end = ledger.bytes["saved_activations"]
            peak.rss = max(peak.rss, rss_bytes())
            self._read_allocator(peak)
            before = ledger.kept.get(name)
            ledger.kept[name] = peak if before is None else peak.keep_larger(before)
        finally:
            ledger.open = None

    def _reset_allocator(self) -> None:
        """Where the device's allocator keeps a peak, start it afresh."""

    def _read_allocator(self, peak: Peak) -> None:
        """Where the device's allocator knows better, take its figures."""

    def _known_models(self) -> list[nn.Module]:
        return [model for known in self._models if (model := known()) is not None]

    def _parameters(self) -> Iterator[nn.Parameter]:
        for model in self._known_models():
            yield from model.parameters()

    def _look(self) -> None:
        """Find the watched tensors as they are now."""
        for model in self._known_models():
            for buffer in model.buffers():
                self._ledger.touch(buffer, "weights")
        for parameter in self._parameters():
            self._ledger.touch(parameter, "weights")
            if parameter.grad is not None:
                self._ledger.touch(parameter.grad, "gradients")
        for owner in self._optimizers:
            optimizer = owner()
            for tensor in tensors_in(optimizer.state) if optimizer is not None else ():
                self._ledger.touch(tensor, "optimizer_state")

    def _hook(self, parameter: nn.Parameter) -> Callable[[], None]:
        """Label gradients on arrival: both what arrives and, where autograd copies it, the copy."""

        def arrives(grad: Tensor) -> None:
            self._ledger.touch(grad, "gradients")

        def arrived(owner: Tensor) -> None:
            if owner.grad is not None:
                self._ledger.touch(owner.grad, "gradients")

        handles = (
            parameter.register_hook(arrives),
            parameter.register_post_accumulate_grad_hook(arrived),
        )

        def remove() -> None:
            for handle in handles:
                handle.remove()

        return remove

    def _pack(self, tensor: Tensor) -> _Saved:
        return _Saved(self._ledger, tensor)

    def live(self) -> dict[str, int]:
        """Bytes by category of what is known to be alive now."""
        self._ledger.bury()
        return dict(self._ledger.bytes)

    def at(self, place: str) -> None:
        """What is allocated from now on is marked with this place, until the next call."""
        self._ledger.place = place

    def largest(self, count: int) -> list[LiveTensor]:
        """The largest storages that are known to be alive now; see memory/largest_storages.py."""
        optimizers = [owner for known in self._optimizers if (owner := known()) is not None]
        return largest(self._ledger, self._known_models(), optimizers, count)

    def tracked(self) -> int:
        """How many live storages are known."""
        return len(self._ledger)

    def peak(self, phase: str) -> PhasePeak | None:
        """A phase's peak; None if it was never measured."""
        peak = self._ledger.kept.get(phase)
        return None if peak is None else peak.frozen()

    def report(self) -> MemoryBlock:
        """Return the ``memory`` block of run.json without the batch's shape; phases in order."""
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
def _gathers_as_weights(models: Iterable[nn.Module], ledger: Ledger) -> Iterator[None]:
    """Inside, what modules gather for their forward pass is booked as weights, not as activations.

    Autograd saves gathered weights as it does any others; nothing but the module knows them.
    """

    def look(module: nn.Module, inputs: Any) -> None:
        for parameter in module.parameters():
            ledger.touch(parameter, "weights")

    with ExitStack() as stack:
        for model in models:
            for module in split_modules(model):  # its own hook, which gathers, runs before
                stack.callback(module.register_forward_pre_hook(look).remove)
        yield


def _resizes_storage(func: Any) -> bool:
    """Whether an operation is FSDP2's: around these, storages shrink and grow with none to see."""
    return getattr(func, "namespace", "") == "fsdp"


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


def make_meter(device: torch.device | str) -> MemoryMeter:
    """The meter for a device: CUDA's allocator where there is one, else counted storages."""
    device = torch.device(device)
    if device.type != "cuda":
        return MemoryMeter(device)
    if not torch.cuda.is_available():
        return MemoryMeter("cpu")
    return CudaMeter(device)
