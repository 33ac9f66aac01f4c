"""The order in which examples are met: a function of (seed, epoch) alone, and its proof."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler


class EpochSampler(Sampler[int]):
    """Indices of one epoch, the same for every method and every resumption.

    Args:
        data: what is sampled.
        seed: of the data order.
        strategy: ``random``, ``sequential`` or ``group_by_length`` (random batches of examples
            of similar length, so that less is padding).
        lengths: tokens of each example, for ``group_by_length``.
        batch_size: examples per optimizer step, of all devices, for ``group_by_length``.
    """

    def __init__(
        self,
        data: Sized,
        *,
        seed: int,
        strategy: str,
        lengths: Sequence[int] | None = None,
        batch_size: int = 1,
    ) -> None:
        self._size = len(data)
        self._seed, self._strategy = seed, strategy
        self._lengths, self._batch_size = lengths, batch_size
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader before each epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[int]:
        if self._strategy == "sequential":
            return iter(range(self._size))
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        if self._strategy == "group_by_length":
            from transformers.trainer_pt_utils import get_length_grouped_indices

            assert self._lengths is not None
            grouped = get_length_grouped_indices(
                list(self._lengths), self._batch_size, generator=generator
            )
            return iter(grouped)
        order: list[int] = torch.randperm(self._size, generator=generator).tolist()
        return iter(order)


class OrderHash:
    """A chain of digests over the batches that reached the model, kept at some steps.

    Two runs met the same batches in the same order up to step n if and only if their digests at n
    are equal.
    """

    def __init__(self, every: int) -> None:
        self._every = max(1, every)
        self._digest = b""
        self.kept: dict[str, str] = {}

    def add(self, batch: Mapping[str, Any]) -> None:
        """Take in one (micro-)batch: its token ids and labels."""
        sha = hashlib.sha256(self._digest)
        for name in ("input_ids", "labels"):
            value = batch.get(name)
            if isinstance(value, Tensor):
                sha.update(f"{name} {tuple(value.shape)}".encode())
                sha.update(value.detach().cpu().contiguous().numpy().tobytes())
        self._digest = sha.digest()

    def mark(self, step: int, last: bool = False) -> None:
        """Note the digest after optimizer step ``step``, at every n-th and at the last."""
        if last or step % self._every == 0:
            self.kept[str(step)] = self._digest.hex()

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs to go on with the chain."""
        return {"digest": self._digest.hex(), "kept": dict(self.kept)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state`."""
        self._digest = bytes.fromhex(state["digest"])
        self.kept = dict(state["kept"])
