"""Cross entropy of a linear head over many classes, against few of the wrong classes.

The full loss of a position with hidden state h and target t is -z_t + log sum_j exp(z_j) over all V
classes. Both losses here keep z_t and sum over a set of wrong classes that random vectors choose,
so that most logits are never computed:

- Scalable Cross-Entropy (SCE; Mezentsev et al. 2024, arXiv 2409.18721, Algorithm 1): a bucket is a
  random vector with the positions and the classes that have the largest product with it. Positions
  in no bucket are left out; a position in several buckets counts with its largest loss.
- RECE (Gusak et al. 2024, arXiv 2408.02354): every position and class belongs to the random vector
  that it has the largest product with. Both are sorted by the number of their vector and cut into
  equal chunks; the classes of a position are those of its chunk and of the neighbouring ones. In
  several rounds, a class that is found k times counts with 1/k of exp(z_j), so once.

Both equal the full loss if the chosen sets hold every position and class. The random vectors see
hidden states and weights, not the bias, scale or cap of a head.

As in :mod:`~sparsegrad_cli.numerics.linear_cross_entropy`, gradients are computed in the forward
pass and logits are never kept: the sets are read twice, first for the normalizers, then for the
gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsegrad_cli.numerics import linear_cross_entropy as full_loss


@dataclass(frozen=True)
class ClassSets:
    """Groups of positions, and the classes that each group is compared with.

    Attributes:
        rows: of each group, its positions; int64, each position once.
        classes: of each group, its classes; int64, each class once.
        largest: whether a position counts in the group with its largest loss only (SCE), not in all
            of its groups together (RECE).
        row_chunks, class_chunks: for RECE in several rounds, the chunk of each position and class
            in each round, (R, N) and (R, V) int32; they tell how often a pair was found.
        neighbours: for RECE, how many chunks on either side are compared.
    """

    rows: Sequence[Tensor]
    classes: Sequence[Tensor]
    largest: bool
    row_chunks: Tensor | None = None
    class_chunks: Tensor | None = None
    neighbours: int = 0

    def log_counts(self, rows: Tensor, classes: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Return log k of the pairs that were found k times; None if every k is 1."""
        if self.row_chunks is None or self.class_chunks is None:
            return None
        found = torch.zeros((len(rows), len(classes)), dtype=dtype, device=rows.device)
        for row_chunk_N, class_chunk_V in zip(self.row_chunks, self.class_chunks, strict=True):
            apart = row_chunk_N[rows][:, None] - class_chunk_V[classes]
            found += apart.abs_() <= self.neighbours
        return found.log_()


def sce_sets(
    hidden_NI: Tensor,
    weight_VI: Tensor,
    generator: torch.Generator,
    *,
    buckets: int | None = None,
    positions: int | None = None,
    classes: int = 256,
    mix: bool = True,
) -> ClassSets:
    """Choose the sets of Scalable Cross-Entropy (arXiv 2409.18721, Algorithm 1, lines 2 to 8).

    Args:
        generator: of the CPU, so that every device draws the same vectors.
        buckets: number of random vectors; 2 sqrt(N) by default, as in the paper's experiments.
        positions: of a bucket, at most N; 2 sqrt(N) by default.
        classes: of a bucket, at most V.
        mix: whether a random vector is a random mixture of the hidden states (the paper's Mix), not
            a normal vector of its own.
    """
    rows = len(hidden_NI)
    usual = max(1, int(2 * math.sqrt(rows)))
    count = buckets or usual
    per_bucket = min(rows, positions or usual)
    drawn = torch.randn((count, rows if mix else hidden_NI.shape[1]), generator=generator)
    vectors_BI = drawn.to(hidden_NI.device)
    if mix:
        vectors_BI = vectors_BI @ hidden_NI.to(vectors_BI.dtype)
        # Only the order of the products matters; this keeps them in the range of float16.
        vectors_BI = torch.nn.functional.normalize(vectors_BI)
    vectors_BI = vectors_BI.to(hidden_NI.dtype)
    rows_BP = _largest(vectors_BI, hidden_NI, per_bucket)
    classes_BC = _largest(vectors_BI, weight_VI, min(len(weight_VI), classes))
    return ClassSets(rows_BP.unbind(), classes_BC.unbind(), largest=True)


def rece_sets(
    hidden_NI: Tensor,
    weight_VI: Tensor,
    generator: torch.Generator,
    *,
    chunks: int | None = None,
    neighbours: int = 1,
    rounds: int = 1,
) -> ClassSets:
    """Choose the sets of RECE (arXiv 2408.02354), with as many chunks as random vectors.

    Args:
        generator: of the CPU, so that every device draws the same vectors.
        chunks: at most N and V; by default the authors' optimum for memory,
            sqrt(4 (1 + 2 neighbours) min(N, V)).
        neighbours: chunks of classes on either side that a chunk of positions is compared with.
        rounds: independent draws whose sets are joined.
    """
    rows, vocabulary = len(hidden_NI), len(weight_VI)
    fewest = min(rows, vocabulary)
    count = min(fewest, chunks or int(math.sqrt(4 * (1 + 2 * neighbours) * fewest)))
    row_sets, class_sets, row_chunks, class_chunks = [], [], [], []
    for _ in range(rounds):
        drawn = torch.randn((count, hidden_NI.shape[1]), generator=generator).to(hidden_NI)
        row_order, row_chunk = _chunked(drawn, hidden_NI)
        class_order, class_chunk = _chunked(drawn, weight_VI)
        row_chunks.append(row_chunk)
        class_chunks.append(class_chunk)
        for chunk in range(count):
            first, last = max(0, chunk - neighbours), min(count, chunk + neighbours + 1)
            row_sets.append(row_order[chunk * rows // count : (chunk + 1) * rows // count])
            class_sets.append(class_order[first * vocabulary // count : last * vocabulary // count])
    if rounds == 1:
        return ClassSets(row_sets, class_sets, largest=False)
    return ClassSets(
        row_sets,
        class_sets,
        False,
        torch.stack(row_chunks),
        torch.stack(class_chunks),
        neighbours,
    )


def _largest(vectors_BI: Tensor, items_KI: Tensor, count: int) -> Tensor:
    """Return the items with the largest products with each vector, (B, count) int64."""
    block = full_loss.block_rows(len(items_KI), items_KI.device)
    found = [(block_BI @ items_KI.T).topk(count).indices for block_BI in vectors_BI.split(block)]
    return torch.cat(found)


def _chunked(vectors_BI: Tensor, items_KI: Tensor) -> tuple[Tensor, Tensor]:
    """Sort items by their vector, and cut them into as many equal chunks as there are vectors.

    Returns:
        The items in order (int64), and the chunk of each item (int32), both (K,).
    """
    block = full_loss.block_rows(len(vectors_BI), items_KI.device)
    nearest = [(block_KI @ vectors_BI.T).argmax(1) for block_KI in items_KI.split(block)]
    order_K = torch.cat(nearest).argsort(stable=True)
    count, chunks = len(items_KI), len(vectors_BI)
    places = torch.arange(1, count + 1, device=items_KI.device)
    # Chunk c holds the places from floor(c K / chunks) on.
    chunk_of_place = ((places * chunks - 1) // count).to(torch.int32)
    return order_K, torch.empty_like(chunk_of_place).scatter_(0, order_K, chunk_of_place)


def sampled_cross_entropy(
    hidden_NI: Tensor,
    weight_VI: Tensor,
    target_N: Tensor,
    sets: ClassSets,
    *,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    cap: float | None = None,
) -> Tensor:
    """Return N times the mean loss of the positions in ``sets``, differentiable once.

    The loss of a position is log(1 + exp(s - z_t)), where s is the log of the sum of exp(z_j) over
    the wrong classes of its set. N times the mean is an estimate of the sum over all positions, so
    that micro-batches count by their size.

    Args:
        hidden_NI, weight_VI, target_N, bias_V, scale, cap: see
            :func:`~sparsegrad_cli.numerics.linear_cross_entropy.linear_cross_entropy`.
        sets: of :func:`sce_sets` or :func:`rece_sets`.

    Returns:
        A scalar in float32, in float64 for float64 inputs.
    """
    # The gradients' sums are wide, and autocast would narrow the products that are added to them.
    with torch.autocast(hidden_NI.device.type, enabled=False):
        loss: Tensor = _SampledCrossEntropy.apply(
            hidden_NI, weight_VI, bias_V, target_N, sets, scale, cap
        )
    return loss


@dataclass(frozen=True)
class _Head:
    """Logits, targets and sets of one call."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    sets: ClassSets
    scale: float
    cap: float | None

    def blocks(self) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
        """Yield group, positions, classes, the classes' weights, and logits z (B, C)."""
        wide = torch.promote_types(self.hidden.dtype, torch.float32)
        for group, (rows, classes) in enumerate(
            zip(self.sets.rows, self.sets.classes, strict=True)
        ):
            weight_CI = self.weight.index_select(0, classes)
            bias_C = None if self.bias is None else self.bias.index_select(0, classes)
            size = full_loss.block_rows(len(classes), rows.device)
            for rows_B in rows.split(size):
                z_BC = (self.hidden.index_select(0, rows_B) @ weight_CI.T).to(wide)
                yield group, rows_B, classes, weight_CI, self._finished(z_BC, bias_C)

    def positive(self) -> Tensor:
        """Return the logits of the targets, (N,)."""
        wide = torch.promote_types(self.hidden.dtype, torch.float32)
        weight_NI = self.weight.index_select(0, self.target)
        z_N = torch.linalg.vecdot(self.hidden.to(wide), weight_NI.to(wide))
        return self._finished(
            z_N, None if self.bias is None else self.bias.index_select(0, self.target)
        )

    def _finished(self, z: Tensor, bias: Tensor | None) -> Tensor:
        if bias is not None:
            z.add_(bias)
        if self.scale != 1:
            z.mul_(self.scale)
        if self.cap is not None:
            z.div_(self.cap).tanh_().mul_(self.cap)
        return z

    def chained(self, dz: Tensor, z: Tensor) -> Tensor:
        """Return the gradient of W h + b from that of the logits z."""
        if self.cap is not None:
            dz = dz * (1 - (z / self.cap).square_())
        return dz * self.scale if self.scale != 1 else dz

    def weighed(self, z_BC: Tensor, rows_B: Tensor, classes_C: Tensor) -> Tensor:
        """Return z - log k, and -inf for targets: the logits that s is the logsumexp of."""
        log_counts = self.sets.log_counts(rows_B, classes_C, z_BC.dtype)
        found = z_BC if log_counts is None else z_BC - log_counts
        return found.masked_fill(classes_C == self.target[rows_B][:, None], -math.inf)

    def normalizers(self) -> tuple[Tensor, Tensor]:
        """Return s (N,), and the group of each position that counts (N,); -1 for no group."""
        wide = torch.promote_types(self.hidden.dtype, torch.float32)
        s_N = self.hidden.new_full((len(self.target),), -math.inf, dtype=wide)
        group_N = torch.full_like(self.target, -1)
        for group, rows_B, classes_C, _, z_BC in self.blocks():
            s_B = self.weighed(z_BC, rows_B, classes_C).logsumexp(1)
            before = s_N[rows_B]
            if self.sets.largest:
                better = (s_B > before) | (group_N[rows_B] < 0)
                s_N.index_copy_(0, rows_B, torch.where(better, s_B, before))
                groups = torch.where(better, group, group_N[rows_B])
                group_N.index_copy_(0, rows_B, groups)
            else:
                s_N.index_copy_(0, rows_B, torch.logaddexp(before, s_B))
                group_N.index_fill_(0, rows_B, group)
        return s_N, group_N


class _SampledCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NI: Tensor,
        weight_VI: Tensor,
        bias_V: Tensor | None,
        target_N: Tensor,
        sets: ClassSets,
        scale: float,
        cap: float | None,
    ) -> Tensor:
        head = _Head(hidden_NI, weight_VI, bias_V, target_N, sets, scale, cap)
        s_N, group_N = head.normalizers()
        positive_N = head.positive()
        counted_N = (group_N >= 0).to(s_N.dtype)
        share_N = counted_N * (len(target_N) / counted_N.sum())  # N times the mean, as a sum
        loss = (torch.nn.functional.softplus(s_N - positive_N) * share_N).sum()
        gradients = _Gradients(ctx.needs_input_grad, head)
        if gradients.wanted:
            gradients.add(s_N, positive_N, group_N, share_N)
        ctx.save_for_backward(*gradients.finished())
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (full_loss.scaled_gradient(d, grads[0]) for d in ctx.saved_tensors)
        return (*scaled, None, None, None, None)


class _Gradients:
    """Sums of the gradients for hidden states, weight and bias, those that are needed."""

    def __init__(self, needed: Sequence[bool], head: _Head) -> None:
        self._head = head
        tensors = (head.hidden, head.weight, head.bias)
        self._sums = [
            torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
            if need and tensor is not None
            else None
            for need, tensor in zip(needed, tensors, strict=False)
        ]
        self._dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]

    @property
    def wanted(self) -> bool:
        return any(total is not None for total in self._sums)

    def add(self, s_N: Tensor, positive_N: Tensor, group_N: Tensor, share_N: Tensor) -> None:
        """Add dL/dz of all sets: share (p - 1) for the target and share p_j for wrong classes."""
        head = self._head
        dhidden, dweight, dbias = self._sums
        total_N = torch.logaddexp(s_N, positive_N)
        for group, rows_B, classes_C, weight_CI, z_BC in head.blocks():
            share_B = share_N[rows_B]
            if head.sets.largest:
                share_B = share_B * (group_N[rows_B] == group)
            p_BC = (head.weighed(z_BC, rows_B, classes_C) - total_N[rows_B][:, None]).exp_()
            dz_BC = head.chained(p_BC.mul_(share_B[:, None]), z_BC)
            if dbias is not None:
                dbias.index_add_(0, classes_C, dz_BC.sum(0))
            if dweight is not None:
                hidden_BI = head.hidden.index_select(0, rows_B).to(dweight.dtype)
                dweight.index_add_(0, classes_C, dz_BC.T @ hidden_BI)
            if dhidden is not None:
                product = dz_BC.to(weight_CI.dtype) @ weight_CI
                dhidden.index_add_(0, rows_B, product.to(dhidden.dtype))
        dz_N = head.chained(((positive_N - total_N).exp() - 1) * share_N, positive_N)
        if dbias is not None:
            dbias.index_add_(0, head.target, dz_N)
        if dweight is not None:
            added = dz_N[:, None] * head.hidden.to(dweight.dtype)
            dweight.index_add_(0, head.target, added)
        if dhidden is not None:
            weight_NI = head.weight.index_select(0, head.target)
            dhidden.addcmul_(dz_N[:, None], weight_NI.to(dhidden.dtype))

    def finished(self) -> list[Tensor | None]:
        """Return the sums in the dtypes of their tensors."""
        return [
            None if total is None else total.to(dtype)
            for total, dtype in zip(self._sums, self._dtypes, strict=True)
        ]
