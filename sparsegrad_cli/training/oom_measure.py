"""Forward, backward and optimizer step tried for their memory: what they need, or where they fail.

For a run that is over: weights and optimizer state are not what they were afterwards.
"""

from __future__ import annotations

import ctypes
import gc
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad_cli.error_mapping import is_out_of_memory, may_be_out_of_memory
from sparsegrad_cli.memory.meter import MemoryMeter
from sparsegrad_cli.memory.storage_tracker import LiveTensor, tensors_in

Phase = Callable[[str], AbstractContextManager[Any]]
SHOWN = 5


@dataclass(frozen=True)
class Attempt:
    """How it went.

    Attributes:
        fits: it came to its end.
        peak_bytes: the most that was alive at once, of a failed one until then.
        phase: where it ended: a phase of the memory report.
        module: the module that was at work there; of a backward pass the one whose gradient had
            arrived last. Empty outside the model.
        tensors: what was alive when it failed, the largest first.
        unsure: it failed in oneDNN's words, which do not tell a lack of memory from another.
    """

    fits: bool
    peak_bytes: int
    phase: str
    module: str
    tensors: tuple[LiveTensor, ...] = ()
    unsure: bool = False


def attempt(model: nn.Module, meter: MemoryMeter, work: Callable[[Phase], None]) -> Attempt:
    """Do some work, and see whether memory lasts.

    Args:
        meter: a fresh one that watches the model.
        work: is given a context for each phase.
    """
    at = ["", ""]

    def phase(name: str) -> AbstractContextManager[Any]:
        at[0] = name
        return meter.phase(name)

    def arrive(place: str) -> None:
        at[1] = place
        meter.at(place)

    def peak() -> int:
        return int(meter.report()["peak_bytes"])

    try:
        with located(model, arrive):
            work(phase)
    except Exception as error:
        if not may_be_out_of_memory(error):
            raise
        unsure = not is_out_of_memory(error)
        # While the error holds the frames, these hold what was alive.
        tensors = tuple(meter.largest(SHOWN))
        forget(error)
        return Attempt(False, peak(), at[0], at[1], tensors, unsure)
    return Attempt(True, peak(), at[0], at[1])


def forget(error: BaseException) -> None:
    """Let go of what the frames of an error hold: the tensors that there was no room for."""
    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        seen.add(id(at))
        if at.__traceback__ is not None:
            traceback.clear_frames(at.__traceback__)
            at.__traceback__ = None
        at = at.__cause__ or at.__context__
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with suppress(OSError, AttributeError):  # glibc's heap, whose holes fit nothing larger
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def located(model: nn.Module, arrive: Callable[[str], None]) -> Iterator[None]:
    """Inside, ``arrive`` is told which module is at work, in forward and in backward passes."""
    inside: list[str] = []
    handles = []

    def watch(name: str, module: nn.Module) -> None:
        def before(module: nn.Module, args: Any) -> None:
            inside.append(name)
            arrive(name)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            inside.pop()
            arrive(inside[-1] if inside else "")
            _announce(output, name, arrive)

        handles.append(module.register_forward_pre_hook(before))
        handles.append(module.register_forward_hook(after))

    for name, module in model.named_modules():
        watch(name or type(model).__name__, module)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _announce(output: Any, name: str, arrive: Callable[[str], None]) -> None:
    """Say so when the gradient of a module's output arrives; the innermost module's word counts."""
    for tensor in tensors_in(output):
        if tensor.requires_grad and not getattr(tensor, "_announced", False):
            tensor._announced = True  # type: ignore[attr-defined]
            tensor.register_hook(_teller(name, arrive))


def _teller(name: str, arrive: Callable[[str], None]) -> Callable[[Tensor], None]:
    def tell(grad: Tensor) -> None:
        arrive(name)

    return tell
