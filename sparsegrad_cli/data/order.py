"""The order of training examples, which depends on seed and epoch only, and digests of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from sparsegrad_cli.data.batches import UNLABELLED


class EpochSampler(Sampler[int]):
    """Sample the indices of one epoch: the same for every method and after every resume.

    Args:
        data: the data set.
        seed: seed of the order.
        strategy: ``random``, ``sequential`` or ``group_by_length`` (random batches of examples
            of similar length, so that less is padding).
        lengths: tokens of each example, for ``group_by_length``.
        batch_size: examples per optimizer step over all devices, for ``group_by_length``.
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
        """Set the epoch; the data loader calls this before each one."""
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
    """Chained digests over the batches that reached the model, recorded at some steps.

    Two runs saw the same batches in the same order up to step n if and only if their digests at n
    are equal. The chain over rows does not depend on how a batch was cut into micro-batches.

    Attributes:
        kept: optimizer step -> digest over the batches.
        kept_rows: the same over rows without padding; empty after a checkpoint without row digests.
    """

    def __init__(self, every: int) -> None:
        self._every = max(1, every)
        self._digest = b""
        self._rows: bytes | None = b""
        self.kept: dict[str, str] = {}
        self.kept_rows: dict[str, str] = {}

    def add(self, batch: Mapping[str, Any]) -> None:
        """Add the token ids and labels of one (micro-)batch."""
        arrays = {
            name: value.detach().cpu().contiguous().numpy()
            for name in ("input_ids", "labels", "attention_mask")
            if isinstance(value := batch.get(name), Tensor)
        }
        sha = hashlib.sha256(self._digest)
        for name in ("input_ids", "labels"):
            if name in arrays:
                sha.update(f"{name} {arrays[name].shape}".encode())
                sha.update(arrays[name].tobytes())
        self._digest = sha.digest()
        ids = arrays.get("input_ids")
        if self._rows is None:
            return
        if ids is None or ids.ndim != 2 or {len(array) for array in arrays.values()} != {len(ids)}:
            self._rows = hashlib.sha256(self._rows + self._digest).digest()  # it has no rows
            return
        for row in range(len(ids)):
            self._rows = self._with_row({name: array[row] for name, array in arrays.items()})

    def _with_row(self, row: Mapping[str, Any]) -> bytes:
        assert self._rows is not None
        ids, labels = row["input_ids"], row.get("labels")
        # One integer label per token, as in conversations; several labels of a row are floats.
        each = labels is not None and labels.ndim == 1 and labels.dtype.kind == "i"
        there = np.ones(len(ids), dtype=bool)
        if "attention_mask" in row:
            there = row["attention_mask"] > 0
        elif each:  # packed rows: tokens after the last label may be padding
            there = np.flip(np.logical_or.accumulate(np.flip(labels != UNLABELLED)))
        sha = hashlib.sha256(self._rows + ids[there].tobytes())
        if labels is not None:
            sha.update(b"labels" + (labels[there] if each else labels).tobytes())
        return sha.digest()

    def mark(self, step: int, last: bool = False) -> None:
        """Record the digests after optimizer step ``step``, at every n-th step and at the last."""
        if last or step % self._every == 0:
            self.kept[str(step)] = self._digest.hex()
            if self._rows is not None:
                self.kept_rows[str(step)] = self._rows.hex()

    def forget_last(self) -> None:
        """Drop the digests of a last step, when training continues after it."""
        for kept in (self.kept, self.kept_rows):
            for step in [step for step in kept if int(step) % self._every]:
                del kept[step]

    def state(self) -> dict[str, Any]:
        """Return the state that a checkpoint needs to continue the chains."""
        rows = None if self._rows is None else self._rows.hex()
        return {
            "digest": self._digest.hex(),
            "kept": dict(self.kept),
            "rows": rows,
            "kept_rows": dict(self.kept_rows),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state`; without row digests in an old state, none are recorded."""
        self._digest = bytes.fromhex(state["digest"])
        self.kept = dict(state["kept"])
        rows = state.get("rows")
        self._rows = None if rows is None else bytes.fromhex(rows)
        self.kept_rows = dict(state.get("kept_rows") or {})
