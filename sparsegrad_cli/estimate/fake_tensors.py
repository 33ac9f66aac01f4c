"""Run a program on fake tensors, which have a size, a dtype and a storage but take no memory.

Under :class:`ShapesOnly` every new tensor is one of torch's fake tensors. Operations return results
of the right shape, autograd records and saves tensors as usual, hooks and dispatch modes see the
same operations, and a storage reports its real size. If the memory meter looks at the device
``meta``, where fake storages are, it therefore counts what it would count on real tensors.

Fake tensors have no values. If a program reads a value, we assume:

- a number read from a tensor is 1, and a truth value is true (a loss is finite, two results agree);
- a mask, or a search for nonzero elements, selects all elements, which is the upper limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

# This is private API, checked with torch 2.13.
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from sparsegrad_cli.numerics import linear_cross_entropy, row_attention

# Raised if a program reads values in other ways, or uses an operator without known shapes.
NeedsValues = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)

DEVICE = "meta"  # device of a fake tensor's storage, whichever device the tensor reports

_aten = torch.ops.aten
_INDEXING = (
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
)


class ShapesOnly:
    """A context in which new tensors are fake. It may be entered again for the same program."""

    def __init__(self) -> None:
        self._mode = FakeTensorMode(allow_fallback_kernels=False)
        # torch keeps a weak reference to every fake tensor in case it is requested again, and it
        # refuses to move a module whose parameters have weak references. peft moves its modules.
        self._mode.fake_tensor_converter.set_tensor_memo = _forget  # type: ignore
        self._stack = ExitStack()

    def __enter__(self) -> ShapesOnly:
        self._stack.enter_context(self._mode)
        self._stack.enter_context(_Supposed())
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()


def _forget(meta: Tensor, fake: Tensor) -> None:
    """Do nothing, in place of torch's method that remembers fake tensors."""


class _Supposed(TorchDispatchMode):
    """Replace reads of values by the assumptions in the module's docstring."""

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
        if func is _aten._sparse_addmm.default:  # torch has no shape function for it
            return args[0].new_empty(args[0].shape)
        if func in _INDEXING:
            args = (args[0], _positions(args[1]), *args[2:])
        return func(*args, **kwargs)


def _everywhere(mask: Tensor) -> Tensor:
    """Return the positions of all elements, (elements, dimensions) int64."""
    return mask.new_empty((mask.numel(), mask.dim()), dtype=torch.int64)


def _positions(indices: Any) -> list[Tensor | None]:
    """Return the indices, with each mask replaced by the positions of all its elements."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype in (torch.bool, torch.uint8):
            found += _everywhere(index).unbind(1)
        else:
            found.append(index)
    return found


# --- CUDA kernels
#
# torch can fake a CUDA device only in a build with CUDA. The fake run of a step on a GPU therefore
# uses fake CPU tensors. Dropout and attention save other tensors on CUDA than on a CPU, so they
# call CUDA's operators by name. The shapes of these operators are known without a GPU.
#
# - Dropout saves a mask of one byte per value; the CPU saves the scaled mask in the input's dtype.
# - Attention uses the kernel that torch chooses on a recent GPU: flash attention without a mask in
#   half precision; otherwise the memory-efficient kernel, with the mask as a bias in the queries'
#   dtype; and plain products if heads share keys and values, which the efficient kernel does not
#   support. The first two save queries, keys, values, output and one number per row, and never the
#   (length x length) weights. On the CPU, dropout in attention forces the plain products, which
#   save the weights.
# - The loss of a language model is our own function, which makes larger blocks of logits on a GPU.

_HALVES = (torch.float16, torch.bfloat16)
_WIDEST_FLASH_HEAD = 256
_plain_dropout = F.dropout
_plain_rows = linear_cross_entropy.block_rows


@contextmanager
def cuda_kernels() -> Iterator[None]:
    """Use CUDA's dropout, attention and blocks of logits on fake tensors.

    This replaces the functions themselves for the whole process, because torch disables its
    function modes while a backward pass recomputes a block.
    """
    ours = (
        (F, "dropout", _dropout),
        (F, "scaled_dot_product_attention", _attention),
        (linear_cross_entropy, "block_rows", _rows),
        (row_attention, "on_cpu", lambda x: False),
    )
    theirs = [(module, name, getattr(module, name)) for module, name, _ in ours]
    try:
        for module, name, function in ours:
            setattr(module, name, function)
        yield
    finally:
        for module, name, function in theirs:
            setattr(module, name, function)


def _rows(vocabulary: int, device: torch.device) -> int:
    return _plain_rows(vocabulary, torch.device("cuda"))


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or not 0 < p < 1 or inplace:
        return _plain_dropout(input, p, training, inplace)
    dropped: Tensor = torch.native_dropout(input, p, training)[0]
    return dropped


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return the attention of (batch, heads, length, head) tensors, with a GPU's kernel."""
    flash = attn_mask is None and query.dtype in _HALVES and query.shape[-1] <= _WIDEST_FLASH_HEAD
    shared = enable_gqa and query.shape[1] != key.shape[1]
    out: Tensor
    if flash:
        out = _aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )[0]
    elif not shared:
        keeps = any(t.requires_grad for t in (query, key, value))
        bias = None if attn_mask is None else _bias(attn_mask, query, key)
        out = _aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, keeps, dropout_p, is_causal, scale=scale
        )[0]
    else:
        out = _aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]
    return out


def _bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Return the mask as a bias that is added to the attention scores of every head."""
    if mask.dtype is torch.bool:
        hidden = mask.logical_not()
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(hidden, float("-inf"))
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
