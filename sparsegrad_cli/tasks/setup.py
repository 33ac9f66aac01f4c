"""Load the model, data and targets for calibration and training, and make a memory meter."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad_cli.data.order import EpochSampler
from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.memory.meter import MemoryMeter, make_meter
from sparsegrad_cli.memory.out_of_memory import out_of_memory_explained
from sparsegrad_cli.methods.base import MethodSettings, TargetShapes
from sparsegrad_cli.models.digests import body_digest, fingerprint, parameters_digest
from sparsegrad_cli.models.load_model import device_of
from sparsegrad_cli.models.memory_savers import save_memory
from sparsegrad_cli.models.quantized import count_entries, move_model, quantization_state
from sparsegrad_cli.models.targets import (
    NotAdapted,
    Target,
    find_targets,
    head_parameters,
    not_adapted,
    not_adapted_note,
)
from sparsegrad_cli.models.unpadding import Unpadding, use_unpadding
from sparsegrad_cli.progress import Observer
from sparsegrad_cli.recipe.effects import padding_anyway
from sparsegrad_cli.recipe.load_recipe import LoadedRecipe
from sparsegrad_cli.recipe.schema import Recipe
from sparsegrad_cli.recipe.tasks import CHAT_TASKS
from sparsegrad_cli.records.base import Block
from sparsegrad_cli.records.run import (
    HashesBlock,
    ModelBlock,
    PrecisionBlock,
    TaskBlock,
)
from sparsegrad_cli.records.run import NotAdapted as NotAdaptedBlock
from sparsegrad_cli.run.open_run import Run
from sparsegrad_cli.tasks.precision import check_precision, precision_of, slow_bfloat16
from sparsegrad_cli.tasks.task import (
    LoadedTask,
    RowLimits,
    TaskFacts,
    load_chat_task,
    load_classification,
)


@dataclass(kw_only=True)
class Setup(LoadedTask):
    """Model, data and targets of a recipe, before the method has changed the model.

    Attributes:
        targets: the target modules.
        not_adapted: large layers of the model that no target covers.
        fingerprint: fingerprint of the targets' weights.
        head_hash: sha256 (hex) of the head's values.
        body_hash: sha256 (hex) of a sample of all other values.
        precision: the ``precision`` block of the record.
        device: the device of the model.
        method_settings: the recipe's ``method`` section, with the rank filled in.
        meter: a memory meter that watches the model.
        unpadding: how the model computes real tokens only; None if it computes padding too.
    """

    targets: list[Target]
    not_adapted: list[NotAdapted]
    fingerprint: str
    head_hash: str
    body_hash: str
    precision: PrecisionBlock
    device: torch.device
    method_settings: MethodSettings
    meter: MemoryMeter
    unpadding: Unpadding | None = None

    def new_meter(self) -> MemoryMeter:
        """Return another meter that watches the model, for a trial."""
        return watching_meter(self.model, self.device)


def watching_meter(model: nn.Module, device: torch.device) -> MemoryMeter:
    """Return a memory meter that watches a model."""
    meter = make_meter(device)
    meter.watch(model, weights=quantization_state(model))
    return meter


def load(run: Run) -> Setup:
    """Load model, data and targets of a run, and record them.

    Raises:
        SparsegradError: as in :func:`make_setup`, or memory ran out.
    """
    run.begin_phase("load", run.recipe.model.name)
    started = time.perf_counter()
    with out_of_memory_explained(run.recipe, "load"):
        setup = make_setup(run.loaded, run.observer)
    run.seconds["load_s"] = time.perf_counter() - started
    with setup.meter.phase("load"):
        pass
    run.writer.save(**loaded_blocks(run.recipe, setup))
    return setup


def make_setup(loaded: LoadedRecipe, observer: Observer, limits: RowLimits | None = None) -> Setup:
    """Load the model, data and targets of a recipe.

    Args:
        loaded: the recipe.
        observer: receives notes.
        limits: number of rows to load; all by default.

    Raises:
        SparsegradError: the data, tokenizer or model cannot be used; see their loaders.
    """
    recipe = loaded.recipe
    check_precision(loaded)
    load_parts = load_chat_task if recipe.task.name in CHAT_TASKS else load_classification
    parts = load_parts(loaded, limits)
    parts.task = replace(parts.task, notes=(*loaded.notes, *parts.task.notes))
    for note in parts.task.notes:
        observer.note(note)
    model = parts.model
    if recipe.train.gradient_checkpointing and not model.supports_gradient_checkpointing:
        raise UsageError(
            f"{type(model).__name__} does not support gradient checkpointing",
            where=loaded.where("train.gradient_checkpointing"),
            fix="leave it out; a smaller train.per_device_train_batch_size with "
            "train.gradient_accumulation_steps takes less memory, too",
        )
    targets = find_targets(model, recipe.targets)
    left_out = not_adapted(model, targets, recipe.targets)
    if left_out:
        observer.note(not_adapted_note(left_out, recipe.scope))
    shapes = TargetShapes.of(loaded, targets)
    settings = recipe.method.settle(shapes)
    size_notes = settings.notes_on(shapes)
    parts.task = replace(parts.task, notes=(*parts.task.notes, *size_notes))
    for note in size_notes:
        observer.note(note)
    device = device_of(recipe)
    head_hash, body_hash = parameters_digest(head_parameters(model)), body_digest(model)
    model = move_model(model, device)
    save_memory(model, targets, recipe.method.recompute)
    unpadding, padded = without_padding(model, recipe)
    late_notes = [n for n in (padded, slow_bfloat16(recipe.train, device)) if n is not None]
    parts.task = replace(parts.task, notes=(*parts.task.notes, *late_notes))
    for note in late_notes:
        observer.note(note)
    return Setup(
        **vars(parts) | {"model": model},
        targets=targets,
        not_adapted=left_out,
        fingerprint=fingerprint(model, targets),
        head_hash=head_hash,
        body_hash=body_hash,
        precision=precision_of(model, recipe.train, device),
        device=device,
        method_settings=settings,
        meter=watching_meter(model, device),
        unpadding=unpadding,
    )


def without_padding(model: nn.Module, recipe: Recipe) -> tuple[Unpadding | None, str | None]:
    """Let a classifier compute real tokens only, if the recipe allows it and its encoder can.

    Returns:
        How it does; None if it computes padding too, with a note if that is not the recipe's wish.
    """
    if not recipe.train.unpadded or padding_anyway(recipe):
        return None, None
    try:
        return use_unpadding(model), None
    except UsageError as error:
        return None, error.what


def loaded_blocks(recipe: Recipe, setup: Setup) -> dict[str, Block]:
    """Return the blocks ``model``, ``task``, ``precision`` and ``hashes`` of the record."""
    config: Any = setup.model.config
    task, metric = setup.task, setup.objective.metric
    return {
        "model": ModelBlock(
            name=recipe.model.name,
            architecture=type(setup.model).__name__,
            model_type=getattr(config, "model_type", None),
            parameters=count_entries(setup.model),
            dtype=recipe.model.dtype,
            quantization=recipe.model.quantization,
            fingerprint=setup.fingerprint,
            head=setup.head.record() if setup.head else None,
            not_adapted=[
                NotAdaptedBlock(kind=n.kind, shape=list(n.shape), count=n.count)
                for n in setup.not_adapted
            ],
        ),
        "task": TaskBlock(
            name=task.name,
            kind=task.kind,
            metric=metric,
            metric_set=next(iter(setup.validation)),
            regression=task.kind == "regression",
            label_names=list(task.label_names) if task.label_names else None,
            positive_label=task.positive_label,
            class_weights=_named_weights(task),
            training_loss=task.training_loss,
            text_columns=list(task.text_columns),
            train_examples=len(setup.train_data),
            validation_examples={k: len(v) for k, v in setup.validation.items()},
            test_examples={k: len(v) for k, v in setup.test.items()},
            majority_score=task.majority.get(metric),
            majority_accuracy=task.majority.get("accuracy"),
            max_length=recipe.task.max_length,
            padding=recipe.task.padding,
            notes=list(task.notes),
            counts=dict(task.counts),
            sources=list(task.sources),
        ),
        "precision": setup.precision,
        "hashes": HashesBlock(
            data=task.data_hash,
            body=setup.body_hash,
            head_init=setup.head_hash,
            precision=hash_block(setup.precision.formats),
        ),
    }


def _named_weights(task: TaskFacts) -> dict[str, float | None] | None:
    """Return class name -> weight in the loss."""
    if task.class_weights is None:
        return None
    return dict(zip(task.label_names or (), task.class_weights, strict=True))


def hash_block(block: Block) -> str:
    """Return the sha256 (hex) of a block of a record."""
    return hashlib.sha256(json.dumps(block.to_json(), sort_keys=True).encode()).hexdigest()


def random_batches(setup: Setup, batch_size: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Yield random batches of the training data on the model's device, epoch after epoch."""
    epoch = 0
    while True:
        yield from training_batches(setup, random_rows(setup, seed, epoch), batch_size)
        epoch += 1


def random_rows(setup: Setup, seed: int, epoch: int = 0) -> list[int]:
    """Return the numbers of all training rows in the random order of an epoch."""
    sampler = EpochSampler(setup.train_data, seed=seed, strategy="random")
    sampler.set_epoch(epoch)
    return list(sampler)


def training_batches(
    setup: Setup, numbers: Sequence[int], batch_size: int
) -> Iterator[dict[str, Tensor]]:
    """Yield the training rows of these numbers in batches on the model's device."""
    for start in range(0, len(numbers), batch_size):
        rows = [setup.train_data[number] for number in numbers[start : start + batch_size]]
        yield to_device(setup.collator(rows), setup.device)


def first_validation_batches(setup: Setup, count: int, size: int) -> list[dict[str, Tensor]]:
    """Return the first ``count`` rows of the first validation split, in batches of ``size``."""
    data = next(iter(setup.validation.values()))
    rows = [data[row] for row in range(min(count, len(data)))]
    starts = range(0, len(rows), size)
    return [to_device(setup.collator(rows[i : i + size]), setup.device) for i in starts]


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    """Return the tensors of a batch on a device."""
    return {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}
