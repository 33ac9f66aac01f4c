"""What takes the most memory, in words: storages of the meter's books, with their owners' names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from sparsegrad_cli.memory.storage_tracker import Ledger, storages_of


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

    def to_json(self) -> dict[str, Any]:
        """One entry of ``error.tensors`` in run.json."""
        return {
            "bytes": self.nbytes,
            "category": self.category,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "of": self.of,
        }


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
            found.setdefault(storage._cdata, name)

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
