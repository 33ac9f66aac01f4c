"""A recipe's training run on shapes alone: the real model, method, optimizer and memory meter.

Nothing here knows a formula for memory. The model is built from its configuration, calibration
makes the bases, the method prepares the model and makes the optimizer, and forward, backward and
optimizer step run under :class:`~sparsegrad_cli.measure.memory.MemoryMeter`, all on tensors without
memory (:mod:`sparsegrad_cli.measure.shapes`). So what is counted is what a real step would need.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparsegrad_cli.errors import SparsegradError, UsageError
from sparsegrad_cli.measure.cuda_kernels import cuda_kernels
from sparsegrad_cli.measure.memory import MemoryMeter
from sparsegrad_cli.measure.shapes import DEVICE, NeedsValues, ShapesOnly
from sparsegrad_cli.methods.base import Prepared
from sparsegrad_cli.methods.core_plan import with_rank
from sparsegrad_cli.methods.table import make_method
from sparsegrad_cli.modeling.targets import Target, find_targets
from sparsegrad_cli.numerics.hosvd import Basis
from sparsegrad_cli.recipe.loading import LoadedRecipe
from sparsegrad_cli.recipe.method_section import SparsegradMethod
from sparsegrad_cli.training.calibration import basis_keys, calibrate

Batch = dict[str, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]
Kind = Literal["classifier", "language model"]
Kernels = Literal["cpu", "cuda"]

STEP = ("forward", "backward", "optimizer")


def own_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that the model itself computes from labels."""
    loss: Tensor = model(**batch).loss
    return loss


# What a step minimises. A language model's loss in chunks belongs here once training has one.
LOSSES: dict[Kind, Loss] = {"classifier": own_loss, "language model": own_loss}


@dataclass(frozen=True)
class Conditions:
    """What a rehearsal supposes beside the recipe.

    Attributes:
        kind: what is trained.
        kernels: whose kernels save for the backward pass.
        padded: some rows of a batch are padded, so that attention needs a mask.
    """

    kind: Kind = "classifier"
    kernels: Kernels = "cpu"
    padded: bool = True


class Rehearsal:
    """One recipe, ready for steps at any batch size; its optimizer has all the state it will have.

    Args:
        loaded: the recipe.
        config: the model's configuration, its labels named.
        conditions: see there.

    Attributes:
        model, optimizer: ready for a step, of fake tensors.
        prepared: what the method says it trains.
        weights_bytes: parameters and buffers before the method came.
        parameters: entries of the model's parameters before the method came.
        calibration: the peak of calibration (:class:`PhasePeak`); None where there is none.
        notes: what was supposed, for this recipe.

    Raises:
        UsageError: the recipe leaves open what only real gradients can say; or no targets.
        SparsegradError: the model looks at values in a way that has no answer here.
    """

    def __init__(self, loaded: LoadedRecipe, config: Any, conditions: Conditions) -> None:
        self.recipe, self.conditions = loaded.recipe, conditions
        self.notes: list[str] = []
        self._loaded = loaded
        self._loss = LOSSES[conditions.kind]
        self._shapes = ShapesOnly()
        self._token_types = getattr(config, "type_vocab_size", 0) > 1
        self._regression = getattr(config, "problem_type", None) == "regression"
        meter = MemoryMeter(DEVICE)
        with self._inside():
            self.model = self._build(config)
            meter.watch(self.model)
            self.weights_bytes = meter.live()["weights"]
            self.parameters = sum(p.numel() for p in self.model.parameters())
            self.prepared = self._prepared(meter)
            meter.watch(self.model, bases=self.prepared.bases)  # they were bases all along
            self.calibration = meter.peak("calibrate")
            self._enable()
            self._fill_state()

    @contextmanager
    def _inside(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(self._shapes)
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

    def _build(self, config: Any) -> nn.Module:
        import transformers

        loader = (
            transformers.AutoModelForSequenceClassification
            if self.conditions.kind == "classifier"
            else transformers.AutoModelForCausalLM
        )
        dtype = getattr(torch, self.recipe.model.dtype)
        model: nn.Module = loader.from_config(copy.deepcopy(config), dtype=dtype)
        return model

    # --- what the run does before its first step

    def _prepared(self, meter: MemoryMeter) -> Prepared:
        targets = find_targets(self.model, self.recipe.targets, self._loaded.where("targets"))
        settings = self.recipe.method
        if isinstance(settings, SparsegradMethod):
            settings = self._settled(settings, targets)
        self._method = make_method(settings)
        bases: dict[str, Basis] | None = None
        scores: dict[str, Tensor] | None = None
        if self._method.needs_basis:
            assert isinstance(settings, SparsegradMethod)
            bases, scores = self._calibrated(settings, targets, meter)
        return self._method.prepare(
            self.model, targets, scope=self.recipe.scope, bases=bases, scores=scores
        )

    def _settled(self, settings: SparsegradMethod, targets: list[Target]) -> SparsegradMethod:
        """Settings that need no values: the rank is a number, the support is shared out evenly."""
        if isinstance(settings.rank, float):
            raise UsageError(
                f"method.rank {settings.rank:g} is a share of energy: which rank that is, only "
                "calibration on real data can say",
                where=self._loaded.where("method.rank"),
                fix="give a number of directions, or the bytes they may take, for the estimate",
            )
        if settings.allocation == "model":
            self.notes.append("allocation: entries shared out evenly over the targets, as many")
            settings = settings.model_copy(update={"allocation": "target"})
        keys = basis_keys(targets, self.recipe.calibration.basis_per)
        return with_rank(settings, targets, keys, self._loaded.where("method.rank"))

    def _calibrated(
        self, settings: SparsegradMethod, targets: list[Target], meter: MemoryMeter
    ) -> tuple[dict[str, Basis], dict[str, Tensor]]:
        """Bases of the right shapes by the real calibration, one step of it."""
        section, train = self.recipe.calibration, self.recipe.train
        measured = section.basis is None
        changes: dict[str, Any] = {"steps": 1}
        if not measured:  # a basis that is there already costs nothing but its own memory
            changes |= {"source": "random", "decomposition": "exact", "score": "spectral"}
            self.notes.append("calibration.basis is not read: bases as calibration would make them")
        size = section.batch_size or train.per_device_train_batch_size
        found = calibrate(
            self.model,
            targets,
            lambda: iter([self._batch(size, self.recipe.task.max_length)]),
            section.model_copy(update=changes),
            seed=self.recipe.seed,
            rank=settings.rank if settings.form == "core" else None,  # type: ignore[arg-type]
            meter=(lambda: meter.phase("calibrate")) if measured else nullcontext,
        )
        return found.by_target(), found.scores

    def _enable(self) -> None:
        """What the trainer switches on: recomputing, mixed precision, the optimizer."""
        train = self.recipe.train
        if train.gradient_checkpointing:
            self.model.activation_checkpointing_enable()  # type: ignore[operator]
        if train.bf16 or train.fp16:
            from accelerate.utils.operations import convert_outputs_to_fp32

            half = torch.bfloat16 if train.bf16 else torch.float16
            mixed = torch.autocast("cpu", half)(self.model.forward)
            self.model.forward = convert_outputs_to_fp32(mixed)
        self.optimizer = self._method.optimizer(self.model, train)
        if self.conditions.kernels == "cuda" and isinstance(self.optimizer, torch.optim.AdamW):
            for group in self.optimizer.param_groups:
                group["foreach"] = True  # torch's choice on CUDA; fake tensors hide that from it

    def _fill_state(self) -> None:
        """Optimizer steps until the state no longer grows; the first alone is not enough for some.

        Training reaches this after as many steps: bounded state fills up in its own time.
        """
        self.model.train()
        self._loss(self.model, self._batch(1, 8)).backward()
        meter, size = MemoryMeter(DEVICE), -1
        meter.watch(self.model, optimizer=self.optimizer)
        while size != meter.live()["optimizer_state"]:
            size = meter.live()["optimizer_state"]
            self.optimizer.step()
            meter.watch(self.model)
        self.model.zero_grad(set_to_none=True)

    # --- steps

    def _batch(self, size: int, length: int) -> Batch:
        """(size, length) token ids and what goes with them, as the collator makes them."""
        ids = torch.zeros(size, length, dtype=torch.int64)
        batch = {"input_ids": ids}
        if self.conditions.padded:
            batch["attention_mask"] = torch.ones_like(ids)
        if self._token_types:
            batch["token_type_ids"] = torch.zeros_like(ids)
        if self.conditions.kind == "language model":
            batch["labels"] = torch.zeros_like(ids)
        else:
            kind = torch.float32 if self._regression else torch.int64
            batch["labels"] = torch.zeros(size, dtype=kind)
        return batch

    def step(self, size: int, length: int) -> MemoryMeter:
        """Forward, backward and optimizer on one batch, measured; nothing is left behind."""
        meter = MemoryMeter(DEVICE)
        with self._inside():
            batch = self._batch(size, length)
            self.model.train()
            meter.watch(self.model, bases=self.prepared.bases, optimizer=self.optimizer)
            if self.recipe.train.gradient_accumulation_steps > 1:
                self._loss(self.model, batch).backward()  # gradients lie there from the second on
            with meter.phase("forward"):
                loss = self._loss(self.model, batch)
            with meter.phase("backward"):
                loss.backward()
            with meter.phase("optimizer"):
                self.optimizer.step()
            self.model.zero_grad(set_to_none=True)
        return meter

    def evaluation(self, size: int, length: int) -> MemoryMeter:
        """Forward alone on one batch, without gradients, measured."""
        meter = MemoryMeter(DEVICE)
        with self._inside(), torch.no_grad():
            batch = self._batch(size, length)
            self.model.eval()
            meter.watch(self.model, bases=self.prepared.bases, optimizer=self.optimizer)
            with meter.phase("evaluate"):
                self._loss(self.model, batch)
            self.model.train()
        return meter
