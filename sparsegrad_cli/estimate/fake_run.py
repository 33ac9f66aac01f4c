"""Run a recipe on fake tensors: the real model, method, optimizer and memory meter.

There is no formula for memory here. The model is built from its configuration, calibration
makes the bases, the method prepares the model and makes the optimizer, and forward, backward and
optimizer step run under :class:`~sparsegrad_cli.memory.meter.MemoryMeter`, all on tensors without
memory (:mod:`sparsegrad_cli.estimate.fake_tensors`). The meter counts what a real step would need.
With several processes the model is shared over a fake process group, and this process counts what
it holds and what it would send.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparsegrad_cli.calibration.calibrate import calibrate
from sparsegrad_cli.calibration.warmup import WARMUP_BATCHES, warmed_head
from sparsegrad_cli.errors import SparsegradError
from sparsegrad_cli.estimate.fake_model import (
    Batch,
    Mask,
    bare_batch,
    bare_model,
    mask_of,
    transformers_sees,
)
from sparsegrad_cli.estimate.fake_shards import (
    Shard,
    process_mesh,
    shard_bytes,
    share,
    without_sync,
)
from sparsegrad_cli.estimate.fake_tensors import DEVICE, NeedsValues, ShapesOnly, cuda_kernels
from sparsegrad_cli.memory.collectives import CollectiveCounter, Kind, Sent
from sparsegrad_cli.memory.meter import MemoryMeter
from sparsegrad_cli.memory.storage_tracker import PhasePeak
from sparsegrad_cli.methods.base import TargetShapes
from sparsegrad_cli.methods.implementation import Prepared
from sparsegrad_cli.models.memory_savers import save_memory
from sparsegrad_cli.models.precision import autocast_dtype
from sparsegrad_cli.models.targets import (
    Target,
    find_targets,
    not_adapted,
    not_adapted_note,
)
from sparsegrad_cli.models.unpadding import Unpadding
from sparsegrad_cli.numerics.hosvd import Basis
from sparsegrad_cli.recipe.load_recipe import LoadedRecipe
from sparsegrad_cli.recipe.schema import Recipe
from sparsegrad_cli.tasks.setup import without_padding

Kernels = Literal["cpu", "cuda"]

STEP = ("forward", "backward", "optimizer")


def kernels_of_training(recipe: Recipe) -> Kernels:
    """Return the kind of device that training would use on this machine."""
    return "cuda" if torch.cuda.is_available() and not recipe.train.use_cpu else "cpu"


@dataclass(frozen=True)
class Conditions:
    """Assumptions of a fake run beyond the recipe.

    Attributes:
        kernels: the device whose kernels save tensors for the backward pass.
        padded: whether rows have different lengths, so that attention needs a mask for padding.
        processes: number of processes; more than one need an open group of
            :func:`~sparsegrad_cli.estimate.fake_processes.fake_processes`.
        shard: how they share the model; None for a single process.
    """

    kernels: Kernels = "cpu"
    padded: bool = True
    processes: int = 1
    shard: Shard | None = None


class _Stage:
    """Base class of the fake runs of a recipe: its fake tensors, batches and target modules."""

    def __init__(self, loaded: LoadedRecipe, config: Any, conditions: Conditions) -> None:
        self.recipe, self.conditions = loaded.recipe, conditions
        self._loaded = loaded
        self._config = config
        self._shapes = ShapesOnly()
        self._unpadding: Unpadding | None = None

    def _mask(self, evaluating: bool) -> Mask:
        return mask_of(self.recipe, padded=self.conditions.padded, evaluating=evaluating)

    @contextmanager
    def _inside(self, *, evaluating: bool = False) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(self._shapes)
            stack.enter_context(transformers_sees(self._mask(evaluating)))
            if self.conditions.kernels == "cuda":
                stack.enter_context(cuda_kernels())
            try:
                yield
            except NeedsValues as error:
                raise SparsegradError(
                    f"a step of {self.recipe.model.name} needs values where there are shapes only: "
                    f"{type(error).__name__}, {error}",
                    where=self._loaded.where("model.name"),
                    fix="count a real one: `sparsegrad train` with train.max_steps=2",
                ) from error

    def _model(self) -> tuple[nn.Module, list[Target]]:
        """Return the model and its targets, as training has them before the method."""
        model = bare_model(self._loaded, self._config)
        targets = self._targets(model)
        save_memory(model, targets, self.recipe.method.recompute)
        self._unpadding, _ = without_padding(model, self.recipe)
        return model, targets

    def _batch(
        self,
        size: int,
        length: int,
        *,
        evaluating: bool = False,
        lengths: Sequence[int] | None = None,
    ) -> Batch:
        """Return a batch, which has to be used before another one is made.

        Args:
            lengths: tokens of each row; ``length`` each by default.
        """
        if self._unpadding is not None:
            self._unpadding.lengths = lengths or [length] * size
        return bare_batch(self.recipe, self._config, size, length, self._mask(evaluating))

    def _targets(self, model: nn.Module) -> list[Target]:
        return find_targets(model, self.recipe.targets, self._loaded.where("targets"))


class FakeCalibration(_Stage):
    """A recipe's calibration and the warm-up of its head, at any batch size.

    Args:
        loaded, config, conditions: see :class:`FakeRun`.
        rank: number of directions per side that the method keeps.
    """

    def __init__(
        self,
        loaded: LoadedRecipe,
        config: Any,
        conditions: Conditions,
        rank: int | float | None,
    ) -> None:
        super().__init__(loaded, config, conditions)
        self._rank = rank
        with self._inside():
            self.model, self.targets = self._model()

    def peak(self, size: int) -> PhasePeak | None:
        """Return the peak on batches of ``size`` examples of the task's length.

        None if calibration reads no data: it then takes no more memory than the step after it.
        """
        section, train = self.recipe.calibration, self.recipe.train
        meter, length = MemoryMeter(DEVICE), self.recipe.task.max_length

        def measured() -> AbstractContextManager[Any]:
            return meter.phase("calibrate")

        def batches(count: int) -> Iterator[Batch]:
            return (self._batch(size, length) for _ in range(count))

        with self._inside():
            meter.watch(self.model)
            # In the second step optimizer state exists; the outputs of every batch are kept.
            warming = min(WARMUP_BATCHES, section.steps, section.warmup_steps)
            with warmed_head(
                self.model,
                lambda: list(batches(warming)),
                steps=max(warming, min(2, section.warmup_steps)),
                learning_rate=section.warmup_learning_rate,
                seed=self.recipe.seed,
                train=train,
                meter=measured,
            ):
                calibrate(
                    self.model,
                    self.targets,
                    lambda: batches(1),
                    section.model_copy(update={"steps": 1}),
                    seed=self.recipe.seed,
                    rank=self._rank,
                    train=train,
                    meter=measured,
                )
        return meter.peak("calibrate")


class FakeRun(_Stage):
    """A recipe that is ready for steps at any batch size, with full optimizer state.

    Args:
        loaded: the recipe.
        config: the model's configuration, with the task's classes (:func:`name_task`).
        conditions: see :class:`Conditions`.

    Attributes:
        model, optimizer: ready for a step, on fake tensors.
        prepared: what the method trains.
        whole_weights_bytes: bytes of parameters and buffers before the method changed the model.
        weights_bytes: the part of them that this process holds between steps.
        held_bytes: the same with what the method has added to the weights, without bases.
        parameters: number of parameters before the method changed the model.
        state_bytes: bytes of the optimizer's full state.
        sent: kind of collective -> what was sent in the last call of :meth:`step`, with all
            micro-batches of an optimizer step. Sums of single numbers, such as the loss, are not
            counted.
        notes: what was assumed for this recipe.

    Raises:
        UsageError: the memory depends on real gradients, or there are no target modules.
        SparsegradError: the model reads values, which fake tensors do not have.
    """

    def __init__(self, loaded: LoadedRecipe, config: Any, conditions: Conditions) -> None:
        super().__init__(loaded, config, conditions)
        self.notes: list[str] = []
        self._calibrating: FakeCalibration | None = None
        self.sent: dict[Kind, Sent] = {}
        self._mesh = process_mesh() if conditions.shard == "fsdp2" else None
        with self._inside():
            self.model, targets = self._model()
            self.whole_weights_bytes = self.weights_bytes = self._live_weights()
            if conditions.shard == "fsdp2":
                self.weights_bytes = shard_bytes(self.model, conditions.processes)
            self.parameters = sum(p.numel() for p in self.model.parameters())
            self.prepared = self._prepared(targets)
            self._enable(targets)
            self.held_bytes = self._live_weights(self.prepared.bases)
            self._fill_state()

    def _live_weights(self, bases: Sequence[Tensor] = ()) -> int:
        """Return the bytes of the model's parameters and buffers, without those of bases."""
        meter = MemoryMeter(DEVICE)
        meter.watch(self.model, bases=bases)
        return meter.live()["weights"]

    # --- before the first step

    def _prepared(self, targets: list[Target]) -> Prepared:
        left_out = not_adapted(self.model, targets, self.recipe.targets)
        if left_out:
            self.notes.append(not_adapted_note(left_out, self.recipe.scope))
        settings = self.recipe.method
        shapes = TargetShapes.of(self._loaded, targets)
        self._settings, assumed = settings.settle_for_estimate(shapes)
        self.notes += [*assumed, *self._settings.notes_on(shapes)]
        self._method = self._settings.implementation()
        bases = self._bases(targets) if self._settings.calibrates else None
        return self._method.prepare(
            self.model,
            targets,
            scope=self.recipe.scope,
            bases=bases,
            autocast=autocast_dtype(self.recipe.train),
        )

    def _bases(self, targets: list[Target]) -> dict[str, Basis]:
        """Return bases of the right shapes; how they were made does not affect a step."""
        section = self.recipe.calibration
        if section.basis is not None:
            self.notes.append("calibration.basis is not read: bases as calibration would make them")
        found = calibrate(
            self.model,
            targets,
            lambda: iter(()),
            section.model_copy(update={"source": "original", "score": "spectral"}),
            seed=self.recipe.seed,
            rank=self._settings.basis_rank,
        )
        return found.by_target()

    def calibration(self, size: int) -> PhasePeak | None:
        """Return the peak of calibration on batches of ``size`` examples; None if there is none."""
        if not self._settings.calibrates or self.recipe.calibration.basis is not None:
            return None
        if self._calibrating is None:
            self._calibrating = FakeCalibration(
                self._loaded, self._config, self.conditions, self._settings.basis_rank
            )
        return self._calibrating.peak(size)

    def _enable(self, targets: list[Target]) -> None:
        """Set up what the trainer would: recomputation, mixed precision, processes, optimizer."""
        train = self.recipe.train
        if train.gradient_checkpointing:
            self.model.activation_checkpointing_enable()  # type: ignore[operator]
        half = autocast_dtype(train)
        if half is not None:
            from accelerate.utils.operations import convert_outputs_to_fp32

            mixed = torch.autocast("cpu", half)(self.model.forward)
            # accelerate does not convert the outputs of a model that FSDP2 shards.
            sharded = self.conditions.shard == "fsdp2"
            self.model.forward = mixed if sharded else convert_outputs_to_fp32(mixed)
        self._shared = self.model
        if self.conditions.shard is not None:
            self._shared = share(self.model, targets, train, self._mesh)
        self.optimizer = self._method.optimizer(self.model, train)
        if self.conditions.kernels == "cuda" and isinstance(self.optimizer, torch.optim.AdamW):
            for group in self.optimizer.param_groups:
                group["foreach"] = True  # torch's default on CUDA, not detected with fake tensors

    def _fill_state(self) -> None:
        """Step the optimizer until its state stops growing; bounded state takes several steps."""
        self.model.train()
        self._loss(self._batch(1, 8)).backward()
        meter, size = MemoryMeter(DEVICE), -1
        meter.watch(self.model, optimizer=self.optimizer)
        while size != meter.live()["optimizer_state"]:
            size = meter.live()["optimizer_state"]
            self.optimizer.step()
            meter.watch(self.model)
        self.state_bytes = size
        if not self._accumulates:
            self.model.zero_grad(set_to_none=True)

    # --- steps

    def _loss(self, batch: Batch) -> Tensor:
        sampled = self.model.training and self.recipe.train.loss != "full"
        loss: Tensor = self._shared(**batch, **({"loss_draw": (1, 1)} if sampled else {})).loss
        return loss

    def step(self, size: int, length: int, lengths: Sequence[int] | None = None) -> MemoryMeter:
        """Measure forward, backward and optimizer on one batch of shape (size, length).

        Afterwards only gradients stay in memory, and only if the recipe accumulates them.

        Args:
            lengths: tokens of each row without padding; ``length`` each by default.
        """
        meter = MemoryMeter(DEVICE)
        with self._inside():
            self.model.train()
            meter.watch(self.model, bases=self.prepared.bases, optimizer=self.optimizer)
            earlier = self._earlier_micro_batch(meter) if self._accumulates else {}
            batch = self._batch(size, length, lengths=lengths)
            with CollectiveCounter() as last:
                with meter.phase("forward"):
                    loss = self._loss(batch)
                with meter.phase("backward"):
                    loss.backward()
                del loss  # as the trainer does: it keeps the inputs of recomputed blocks alive
                with meter.phase("optimizer"):
                    self.optimizer.step()
            if not self._accumulates:
                self.model.zero_grad(set_to_none=True)
        times = self.recipe.train.gradient_accumulation_steps - 1
        self.sent = {kind: sent.after(times, earlier.get(kind)) for kind, sent in last.sent.items()}
        return meter

    def _earlier_micro_batch(self, meter: MemoryMeter) -> dict[Kind, Sent]:
        """Make the gradients that exist from the second micro-batch on, unless they exist.

        Returns:
            What an earlier micro-batch sends. The gradients of several processes are made again
            each time, because those of the last micro-batch have been reduced.
        """
        if self.conditions.shard is None:
            if not self._have_gradients():
                self._loss(self._batch(1, 8)).backward()
            return {}
        self.model.zero_grad(set_to_none=True)
        # The meter has to see it: under FSDP2, no parameter has these gradients as its ``.grad``.
        counter = CollectiveCounter()
        with without_sync(self._shared), counter, meter.phase("backward"):
            self._loss(self._batch(1, 8)).backward()
        return counter.sent

    @property
    def _accumulates(self) -> bool:
        return self.recipe.train.gradient_accumulation_steps > 1

    def _have_gradients(self) -> bool:
        return any(parameter.grad is not None for parameter in self.model.parameters())

    def evaluation(self, size: int, length: int) -> MemoryMeter:
        """Measure the forward pass of one batch without gradients."""
        meter = MemoryMeter(DEVICE)
        with self._inside(evaluating=True), torch.no_grad():
            self.model.zero_grad(set_to_none=True)
            batch = self._batch(size, length, evaluating=True)
            self.model.eval()
            meter.watch(self.model, bases=self.prepared.bases, optimizer=self.optimizer)
            with meter.phase("evaluate"):
                self._loss(batch)
            self.model.train()
        return meter
