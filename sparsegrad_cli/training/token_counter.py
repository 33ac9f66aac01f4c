"""How many tokens the training steps of a run have, and how many of them were computed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from sparsegrad_cli.models.unpadding import Unpadding
from sparsegrad_cli.records.run import TokensBlock


class TokenCounter:
    """Count the tokens of training steps in this process.

    Args:
        unpadding: how the model computes real tokens only; None if it computes padding too.
        so_far: the counts of the run before; None if it has none.

    Attributes:
        total: the counts so far; None if batches do not tell which of their tokens are real.
    """

    def __init__(self, unpadding: Unpadding | None, so_far: TokensBlock | None) -> None:
        self._unpadding, self.total = unpadding, so_far

    @contextmanager
    def counted(self, batches: Iterable[Mapping[str, Tensor]]) -> Iterator[None]:
        """Count the tokens of one step, which is taken inside."""
        before = self._computed()
        yield
        masks = [batch.get("attention_mask") for batch in batches]
        known = [mask for mask in masks if mask is not None]
        if not known or len(known) < len(masks):
            return
        real, padded = (int(sum(f(m) for m in known)) for f in (Tensor.count_nonzero, Tensor.numel))
        computed = padded if self._unpadding is None else self._computed() - before
        total = self.total or TokensBlock()
        self.total = TokensBlock(
            real=total.real + real,
            padded=total.padded + padded,
            computed=(total.computed or 0) + computed,
        )

    def _computed(self) -> float:
        """Return the tokens computed by the model so far, averaged over its blocks."""
        unpadding = self._unpadding
        return 0 if unpadding is None else unpadding.training.computed / len(unpadding.blocks)
