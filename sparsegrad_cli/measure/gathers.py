"""Weights that FSDP2 makes whole for a while, in the memory meter's books."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from sparsegrad_cli import ranks
from sparsegrad_cli.measure.ledger import Ledger


@contextmanager
def gathers_booked(models: Iterable[nn.Module], ledger: Ledger) -> Iterator[None]:
    """Inside, what modules gather for their forward pass is booked as weights, not as activations.

    Autograd saves gathered weights as it does any others; nothing but the module knows them.
    """
    if ranks.count() == 1:
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    def look(module: nn.Module, inputs: Any) -> None:
        for parameter in module.parameters():
            ledger.touch(parameter, "weights")

    with ExitStack() as stack:
        for model in models:
            for module in model.modules():
                if isinstance(module, FSDPModule):  # its own hook, which gathers, runs before
                    stack.callback(module.register_forward_pre_hook(look).remove)
        yield


def resizes_storage(func: Any) -> bool:
    """Whether an operation is FSDP2's: around these, storages shrink and grow with none to see."""
    return getattr(func, "namespace", "") == "fsdp"
