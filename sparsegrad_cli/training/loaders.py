"""The batches of a run: of the training data in the run's order, and of each validation split."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import skip_first_batches
from torch import Tensor
from torch.utils.data import DataLoader

from sparsegrad_cli import distributed
from sparsegrad_cli.data.batches import longest_first
from sparsegrad_cli.data.order import EpochSampler
from sparsegrad_cli.interruption import raise_if_requested
from sparsegrad_cli.recipe.schema import Recipe
from sparsegrad_cli.tasks.objective import ValidationBatch
from sparsegrad_cli.tasks.setup import Setup


class TrainingBatches:
    """The batches of each epoch, in an order that depends on the seed alone.

    Attributes:
        loader: The data loader, to be replaced by the one that accelerate prepares from it.
    """

    def __init__(self, setup: Setup, recipe: Recipe) -> None:
        self._train = train = recipe.train
        by_length = train.train_sampling_strategy == "group_by_length"
        self._sampler = EpochSampler(
            setup.train_data,
            seed=recipe.seed,
            strategy=train.train_sampling_strategy,
            lengths=[len(ids) for ids in setup.train_data["input_ids"]] if by_length else None,
            batch_size=train.per_device_train_batch_size
            * train.gradient_accumulation_steps
            * distributed.world_size(),
        )
        self.loader: Any = DataLoader(
            setup.train_data,
            batch_size=train.per_device_train_batch_size,
            sampler=self._sampler,
            collate_fn=setup.collator,
            num_workers=train.dataloader_num_workers,
            pin_memory=setup.device.type == "cuda",
        )

    def of_epoch(self, epoch: int, *, first_step: int) -> Iterator[dict[str, Tensor]]:
        """Return this process's micro-batches of an epoch, from its optimizer step ``first_step``.

        Args:
            epoch, first_step: Both counted from 0.
        """
        skipped = first_step * self._train.gradient_accumulation_steps
        loader = skip_first_batches(self.loader, skipped) if skipped else self.loader
        loader.set_epoch(epoch)
        self._sampler.set_epoch(epoch)  # With several processes, a skipping loader does not do it.
        return iter(loader)

    def rows_of(self, step_in_epoch: int, number: int) -> list[int]:
        """Return the rows of a micro-batch of the current epoch, for a run in a single process.

        Args:
            step_in_epoch: The optimizer step, from 0.
            number: The micro-batch's number in the step, from 0.
        """
        size = self._train.per_device_train_batch_size
        start = (step_in_epoch * self._train.gradient_accumulation_steps + number) * size
        return list(self._sampler)[start : start + size]


def validation_batches(
    data: Any,
    collator: Callable[[list[dict[str, Any]]], dict[str, Tensor]],
    *,
    batch_size: int,
    device: torch.device,
    workers: int = 0,
) -> Iterator[ValidationBatch]:
    """Yield this process's share of a split: every n-th row by length, in batches.

    The longest rows come first, so that a batch pads little and memory runs out early if it does.
    All processes yield equally many batches. One that has no rows left yields the first row of
    the split, marked as not its own, because sharded weights need every process in a forward pass.
    No random number of the run is drawn.

    Raises:
        InterruptedRunError: The user asked to stop.
    """
    world_size = distributed.world_size()
    rows = longest_first(data)[distributed.rank() :: world_size]
    longest_share = -(-len(data) // world_size)
    own = [rows[start : start + batch_size] for start in range(0, longest_share, batch_size)]
    loader = iter(
        DataLoader(
            data,
            batch_sampler=[list(batch) or [0] for batch in own],
            collate_fn=collator,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # Workers would otherwise draw from the run's generator.
        )
    )
    for batch_rows in own:
        raise_if_requested("an evaluation batch")
        inputs = {key: value.to(device) for key, value in next(loader).items()}
        yield ValidationBatch(inputs, batch_rows)
