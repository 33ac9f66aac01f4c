"""Running a program on shapes alone: tensors with sizes, dtypes and storages, and no memory.

Under :class:`ShapesOnly` every new tensor is one of torch's fake tensors. Operations give results
of the right shape, autograd records and saves what it always does, hooks and dispatch modes see the
same operations, and a storage has the size that it would have. So the memory meter, told to look at
the device ``meta``, where fake storages are, counts what it would count on real tensors.

What a program asks of *values* has no answer here. These are supposed:

- a number read from a tensor is 1, a truth value is true (a loss is finite, two results agree);
- a mask, or a search for what is not zero, selects everything: the most there could be.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode

# What a program ends with that asks for values in other ways, or uses an operator without shapes.
NeedsValues = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)

DEVICE = "meta"  # of a fake tensor's storage, whatever device the tensor says it is on

_aten = torch.ops.aten
_INDEXING = (
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
)


class ShapesOnly:
    """Inside, tensors have no memory; may be entered again, for more of the same program."""

    def __init__(self) -> None:
        self._mode = FakeTensorMode(allow_fallback_kernels=False)
        # torch keeps a weak reference to every fake tensor, in case the same one is asked for
        # again; and it refuses to move a module (peft moves its own) whose parameters have any.
        self._mode.fake_tensor_converter.set_tensor_memo = _forget  # type: ignore
        self._stack = ExitStack()

    def __enter__(self) -> ShapesOnly:
        self._stack.enter_context(self._mode)
        self._stack.enter_context(_Supposed())
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()


def _forget(meta: Tensor, fake: Tensor) -> None:
    """In place of remembering which fake tensor an operation has made."""


class _Supposed(TorchDispatchMode):
    """Answers questions about values; see the module's text."""

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is _aten._local_scalar_dense.default:
            return True if args[0].dtype is torch.bool else 1
        if func is _aten.equal.default:
            return True
        if func is _aten.nonzero.default:
            return _everywhere(args[0])
        if func is _aten.masked_select.default:
            return args[0].new_empty(args[0].numel())
        if func is _aten._sparse_addmm.default:  # torch knows no shape for it
            return args[0].new_empty(args[0].shape)
        if func in _INDEXING:
            args = (args[0], _positions(args[1]), *args[2:])
        return func(*args, **kwargs)


def _everywhere(mask: Tensor) -> Tensor:
    """(entries, dimensions) int64: the positions of all entries."""
    return mask.new_empty((mask.numel(), mask.dim()), dtype=torch.int64)


def _positions(indices: Any) -> list[Tensor | None]:
    """Indices in which each mask is replaced by the positions of all its entries."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype in (torch.bool, torch.uint8):
            found += _everywhere(index).unbind(1)
        else:
            found.append(index)
    return found
