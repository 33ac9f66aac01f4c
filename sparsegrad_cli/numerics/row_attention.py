"""Attention of rows of different lengths that are stored one after another, without padding.

A batch of B rows is one matrix of T tokens, row after row, the longest row first. Rows of like
length form a group of n rows of at most L tokens. For a group, with H heads of size D:

    P = softmax(scale Q K' + bias)      (n H, q, L), where q is L, or 1 for first tokens alone
    O = drop(P) V                       (n H, q, D)

and, with g = dO and D the dropout's factors (0 or 1 / (1 - p)),

    dV = (P * D)' g,   dP = (g V') * D,   dS = P * (dP - rowsum(dP * P)),
    dQ = scale dS K,   dK = scale dS' Q,  dbias = sum over rows of dS.

P is computed again in the backward pass, so what is saved is Q, K, V and one byte of the dropout's
mask per entry of P. PyTorch's attention keeps P and its mask in float32 if there is dropout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sparsegrad_cli.numerics.dropout import keep_mask

# Microseconds, estimated from a profile on two CPUs with 12 heads of 32: of one more group in both
# passes, and of a token of padding in a group, which grows with the length of its rows.
_GROUP_COST = 400.0
_TOKEN_COST, _TOKEN_COST_BY_LENGTH = 2.0, 0.35
# Of a head in a group, which bounds what is in memory at a time; one row may have more.
_MOST_SCORES = 2**16


@dataclass(frozen=True)
class RowGroup:
    """Consecutive rows of like length.

    Attributes:
        tokens: of the group, among the tokens of the batch.
        rows: the group's rows, among the rows of the batch.
        size: number of rows.
        length: tokens of the longest row, L.
        gathered: (n L,) the token at each place of the rows, where places after the end of a row
            repeat a token; None if all rows have L tokens.
        real: (tokens,) the place of each token; None likewise.
        there: (n, L), whether a place holds a token; None likewise.
    """

    tokens: slice
    rows: slice
    size: int
    length: int
    gathered: Tensor | None = None
    real: Tensor | None = None
    there: Tensor | None = None


def row_groups(lengths: Sequence[int], device: torch.device | None = None) -> list[RowGroup]:
    """Group rows of like length, where that costs less than one more group.

    Args:
        lengths: tokens of each row, at least 1, in descending order.
        device: of the tensors.
    """
    groups, row, token = [], 0, 0
    while row < len(lengths):
        longest = lengths[row]
        per_token = _TOKEN_COST + _TOKEN_COST_BY_LENGTH * longest
        last = min(len(lengths), row + max(1, _MOST_SCORES // longest**2))
        end, padding = row, 0
        while end < last and padding * per_token <= _GROUP_COST:
            end += 1
            padding += longest - lengths[min(end, len(lengths) - 1)]
        groups.append(_group(lengths[row:end], row, token, device))
        token += sum(lengths[row:end])
        row = end
    return groups


def _group(lengths: Sequence[int], row: int, token: int, device: torch.device | None) -> RowGroup:
    size, longest, count = len(lengths), lengths[0], sum(lengths)
    tokens, rows = slice(token, token + count), slice(row, row + size)
    if lengths[-1] == longest:
        return RowGroup(tokens, rows, size, longest)
    length_N1 = torch.tensor(lengths)[:, None]
    there_NL = torch.arange(longest) < length_N1
    start_N1 = token + length_N1.cumsum(0) - length_N1
    # Each row's last token stands for what is after it.
    gathered = start_N1 + torch.minimum(torch.arange(longest), length_N1 - 1)
    # Not searched for in there_NL: values may be unknown, as in an estimate.
    real = torch.cat(
        [torch.arange(row * longest, row * longest + n) for row, n in enumerate(lengths)]
    )
    return RowGroup(
        tokens,
        rows,
        size,
        longest,
        gathered.flatten().to(device),
        real.to(device),
        there_NL.to(device),
    )


class _Side:
    """The tokens of a side of attention: all, or the first of each row."""

    def __init__(self, *, first_only: bool) -> None:
        self._first_only = first_only

    def take(self, x_THD: Tensor, group: RowGroup) -> Tensor:
        """Return the (n H, length, D) tensor of a group's tokens."""
        heads, size = x_THD.shape[1:]
        if self._first_only:
            return x_THD[group.rows].view(group.size * heads, 1, size)
        gathered = group.gathered
        x = x_THD[group.tokens] if gathered is None else x_THD.index_select(0, gathered)
        split = x.view(group.size, group.length, heads, size).transpose(1, 2)
        return split.reshape(group.size * heads, group.length, size)

    def take_gradient(self, g_THD: Tensor, group: RowGroup) -> Tensor:
        """Return :meth:`take`, with zeros where there is no token."""
        g = self.take(g_THD, group)
        if group.there is not None and not self._first_only:
            there = group.there[:, None, :, None].to(g.dtype)
            g.view(group.size, -1, *g.shape[1:]).mul_(there)
        return g

    def put(self, x_THD: Tensor, group: RowGroup, values: Tensor) -> None:
        """Write a (n H, length, D) tensor to a group's tokens."""
        heads, size = x_THD.shape[1:]
        if self._first_only:
            x_THD[group.rows] = values.view(group.size, heads, size)
            return
        by_row = values.view(group.size, heads, group.length, size).transpose(1, 2)
        if group.real is None:
            x_THD[group.tokens].view(by_row.shape).copy_(by_row)
        else:
            x_THD[group.tokens] = by_row.flatten(0, 1).index_select(0, group.real)


_ALL, _FIRST = _Side(first_only=False), _Side(first_only=True)


def _probabilities(
    q: Tensor, k: Tensor, bias_HLL: Tensor | None, scale: float, group: RowGroup
) -> Tensor:
    """Return softmax(scale Q K' + bias), (n H, q, L), in at least float32."""
    scores = torch.bmm(q, k.transpose(1, 2))  # (n H, q, D) @ (n H, D, L)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).mul_(scale)
    by_row = scores.view(group.size, -1, *scores.shape[1:])  # (n, H, q, L)
    if bias_HLL is not None:
        by_row.add_(bias_HLL[:, : q.shape[1], : group.length])
    if group.there is not None:
        by_row.masked_fill_(~group.there[:, None, None], float("-inf"))
    return torch.softmax(scores, -1)


def _mask(bias_HLL: Tensor | None, queries: int, group: RowGroup) -> Tensor | None:
    """Return the mask of torch's attention: a bias, or true where there is a token; or None."""
    there = None if group.there is None else group.there[:, None, None]  # (n, 1, 1, L)
    if bias_HLL is None:
        return there
    bias = bias_HLL[:, :queries, : group.length]
    return bias if there is None else torch.where(there, bias, float("-inf"))


def _by_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias_HLL: Tensor | None,
    scale: float,
    group: RowGroup,
    dropout: float = 0.0,
) -> Tensor:
    """Return drop(P) V of a group, (n, H, q, D), by torch's attention."""
    q, k, v = (x.view(group.size, -1, *x.shape[1:]) for x in (q, k, v))
    mask = _mask(bias_HLL, q.shape[2], group)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)


class _RowAttention(torch.autograd.Function):
    """See :func:`row_attention`."""

    @staticmethod
    def forward(
        ctx: Any,
        q_QHD: Tensor,
        k_THD: Tensor,
        v_THD: Tensor,
        bias_HLL: Tensor | None,
        groups: Sequence[RowGroup],
        scale: float,
        dropout: float,
        first_only: bool,
    ) -> Tensor:
        ctx.groups, ctx.scale, ctx.factor = groups, scale, 1.0
        ctx.queries = queries = _FIRST if first_only else _ALL
        out_QHD = torch.empty_like(q_QHD)
        masks = []
        for group in groups:
            q, k = queries.take(q_QHD, group), _ALL.take(k_THD, group)
            v = _ALL.take(v_THD, group)
            if not dropout:
                out = _by_torch(q, k, v, bias_HLL, scale, group)
                queries.put(out_QHD, group, out.reshape(q.shape))
                continue
            weights = _probabilities(q, k, bias_HLL, scale, group)
            kept, ctx.factor = keep_mask(weights.shape, dropout)
            masks.append(kept)
            weights.mul_(kept.to(weights.dtype).mul_(ctx.factor))
            # (n H, q, L) @ (n H, L, D)
            queries.put(out_QHD, group, torch.bmm(weights.to(v.dtype), v))
        ctx.save_for_backward(q_QHD, k_THD, v_THD, bias_HLL, *masks)
        return out_QHD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (g_QHD,) = grads
        q_QHD, k_THD, v_THD, bias_HLL, *masks = ctx.saved_tensors
        queries: _Side = ctx.queries
        dq_QHD, dk_THD, dv_THD = (torch.empty_like(x) for x in (q_QHD, k_THD, v_THD))
        dbias_HLL = torch.zeros_like(bias_HLL) if ctx.needs_input_grad[3] else None
        g_QHD = g_QHD.to(q_QHD.dtype)
        for number, group in enumerate(ctx.groups):
            q, g = queries.take(q_QHD, group), queries.take_gradient(g_QHD, group)
            k, v = _ALL.take(k_THD, group), _ALL.take(v_THD, group)
            weights = _probabilities(q, k, bias_HLL, ctx.scale, group)
            dweights = torch.bmm(g, v.transpose(1, 2)).to(weights.dtype)  # (nH, q, D) @ (nH, D, L)
            used = weights
            if masks:
                factors = masks[number].to(weights.dtype).mul_(ctx.factor)
                used = weights * factors
                dweights.mul_(factors)
            # (n H, L, q) @ (n H, q, D)
            _ALL.put(dv_THD, group, torch.bmm(used.to(g.dtype).transpose(1, 2), g))
            dscores = dweights.mul_(weights)
            dscores.addcmul_(weights, dscores.sum(-1, keepdim=True), value=-1)
            if dbias_HLL is not None:
                part = dbias_HLL[:, : q.shape[1], : group.length]
                part += dscores.view(group.size, *part.shape).sum(0)
            dscores = dscores.mul_(ctx.scale).to(q.dtype)
            # (n H, q, L) @ (n H, L, D), and (n H, L, q) @ (n H, q, D)
            queries.put(dq_QHD, group, torch.bmm(dscores, k))
            _ALL.put(dk_THD, group, torch.bmm(dscores.transpose(1, 2), q))
        return dq_QHD, dk_THD, dv_THD, dbias_HLL, None, None, None, None


def row_attention(
    q_QHD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    groups: Sequence[RowGroup],
    *,
    scale: float,
    dropout: float = 0.0,
    bias_HLL: Tensor | None = None,
    first_only: bool = False,
) -> Tensor:
    """Return the attention of each row to itself, on the CPU.

    Args:
        q_QHD: queries of all T tokens; with ``first_only``, of the first tokens of the B rows.
        k_THD, v_THD: keys and values of all tokens, in the dtype of the queries.
        groups: of :func:`row_groups`, for the rows in the order of the tokens.
        scale: factor of the scores.
        dropout: probability with which a weight is dropped.
        bias_HLL: added to the scores of every row, whose length is at most L; None for none.
        first_only: whether only the first token of every row has a query.

    Returns:
        The shape of ``q_QHD``. The products are made in its dtype, the softmax in at least
        float32. It is differentiable once, in all tensors.
    """
    with torch.autocast("cpu", enabled=False):
        out_QHD: Tensor = _RowAttention.apply(
            q_QHD, k_THD, v_THD, bias_HLL, groups, scale, dropout, first_only
        )
    return out_QHD


def on_cpu(x: Tensor) -> bool:
    """Return whether the forms for the CPU are used for a tensor."""
    return x.device.type == "cpu"


def padded_attention(
    q_QHD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    groups: Sequence[RowGroup],
    *,
    scale: float,
    dropout: float = 0.0,
    bias_HLL: Tensor | None = None,
    first_only: bool = False,
) -> Tensor:
    """Return what :func:`row_attention` returns, by torch's attention on rows with padding.

    Padding exists in here only. It works on any device.
    """
    queries = _FIRST if first_only else _ALL
    pieces = []
    for group in groups:
        q, k = queries.take(q_QHD, group), _ALL.take(k_THD, group)
        out = _by_torch(q, k, _ALL.take(v_THD, group), bias_HLL, scale, group, dropout)
        flat = out.transpose(1, 2).flatten(0, 1)  # (n q, H, D)
        pieces.append(flat if first_only or group.real is None else flat[group.real])
    return torch.cat(pieces)
