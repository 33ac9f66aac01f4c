"""Weights that FSDP2 makes whole for a while, in the memory meter's books."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from sparsegrad_cli.memory.storage_tracker import Ledger
from sparsegrad_cli.models.sharded_tensors import split_modules


@contextmanager
def gathers_booked(models: Iterable[nn.Module], ledger: Ledger) -> Iterator[None]:
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


def resizes_storage(func: Any) -> bool:
    """Whether an operation is FSDP2's: around these, storages shrink and grow with none to see."""
    return getattr(func, "namespace", "") == "fsdp"
