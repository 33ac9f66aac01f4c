"""What CUDA keeps for the backward pass where the CPU keeps something else, on tensors of any kind.

torch can fake a CUDA device only in a build that has CUDA. So the rehearsal of a step on a GPU runs
on fake CPU tensors, and dropout and attention, which save other things there, call CUDA's
operators by name. Their shapes are known without a GPU; nothing can be computed with them.

- Dropout: one mask of a byte an entry; the CPU keeps the scaled mask in the input's dtype.
- Attention, chosen as torch chooses on a recent GPU: flash where there is no mask and the dtype is
  a half; else the memory-efficient kernel, the mask as a bias in the queries' dtype; the plain
  products where heads are shared and the efficient kernel cannot. The first two keep queries, keys,
  values, output and one number a row, never the (length x length) weights, dropout or not; on the
  CPU dropout in attention forces the plain products, which keep them.
- The loss of a language model: our own function, which makes larger blocks of logits on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsegrad_cli.numerics import linear_cross_entropy

_aten = torch.ops.aten
_HALVES = (torch.float16, torch.bfloat16)
_WIDEST_FLASH_HEAD = 256
_plain_dropout = F.dropout
_plain_rows = linear_cross_entropy.block_rows


@contextmanager
def cuda_kernels() -> Iterator[None]:
    """Inside, dropout, attention and blocks of logits are CUDA's; for tensors without values.

    The functions themselves are replaced, for the whole process: where a backward pass computes a
    block again, torch switches its function modes off.
    """
    ours = (
        (F, "dropout", _dropout),
        (F, "scaled_dot_product_attention", _attention),
        (linear_cross_entropy, "block_rows", _rows),
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
    """(batch, heads, length, head) each; see the module's text."""
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
    """The mask as what is added to the products, seen by every head."""
    if mask.dtype is torch.bool:
        hidden = mask.logical_not()
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(hidden, float("-inf"))
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
