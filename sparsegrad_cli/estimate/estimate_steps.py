"""Estimate the memory of a training step from a model's configuration alone.

Each recipe gets a row: the peak of forward, backward and optimizer by category, counted in a fake
run (:mod:`sparsegrad_cli.estimate.fake_run`), and, for a given device, the largest batch that fits.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

from sparsegrad_cli.data.text_tokens import fitting_length
from sparsegrad_cli.error_mapping import mapped_errors
from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.estimate.fake_model import mask_of, name_task
from sparsegrad_cli.estimate.fake_processes import fake_processes
from sparsegrad_cli.estimate.fake_run import STEP, Conditions, FakeRun
from sparsegrad_cli.estimate.largest_size import MOST, largest_batch
from sparsegrad_cli.memory.frozen_gc import frozen_gc
from sparsegrad_cli.memory.storage_tracker import PhasePeak
from sparsegrad_cli.models.architectures import configuration_of
from sparsegrad_cli.progress import Observer
from sparsegrad_cli.recipe.load_recipe import LoadedRecipe, to_plain
from sparsegrad_cli.recipe.schema import Recipe
from sparsegrad_cli.records.estimate import (
    Collective,
    DeviceRoom,
    EstimateConditions,
    EstimatedCounts,
    EstimatedModel,
    EstimateRecord,
    EstimateRow,
    LargestBatch,
    ProcessShare,
)
from sparsegrad_cli.records.run import MemoryCategories
from sparsegrad_cli.run.launcher import FSDP, check_recipe_sharding
from sparsegrad_cli.tasks.precision import check_precision

# Keys of a recipe's train section that affect memory.
_TRAIN = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "unpadded",
    "loss",
    "loss_buckets",
    "loss_bucket_positions",
    "loss_bucket_classes",
    "loss_mix",
    "loss_neighbours",
    "loss_rounds",
    "bf16",
    "fp16",
)


@dataclass(frozen=True)
class Room:
    """A device's memory.

    Attributes:
        total_bytes: size of the memory.
        overhead_bytes: used before the first tensor, by the context, kernels and workspaces.
    """

    total_bytes: int
    overhead_bytes: int

    @property
    def for_tensors(self) -> int:
        """Bytes left for tensors."""
        return self.total_bytes - self.overhead_bytes


@mapped_errors(
    again="run the same command again",
    memory=("estimate", "fewer methods at a time: shapes alone take a few hundred MiB"),
)
def estimate_steps(
    cells: Sequence[tuple[str, LoadedRecipe]],
    conditions: Conditions,
    room: Room | None = None,
    observer: Observer | None = None,
) -> EstimateRecord:
    """Estimate the peaks of a training step for every recipe.

    Args:
        cells: label and recipe of every row.
        conditions: assumptions beyond the recipes.
        room: a device's memory; if given, also find the largest batch that fits.
        observer: notified of each row before it is counted.

    Raises:
        UsageError, DownloadError, FileFormatError: a step of a recipe cannot be run.
        SparsegradError: there are several processes, which this version of torch cannot simulate.
    """
    observer = observer or Observer()
    started = time.perf_counter()
    known: dict[str, EstimateRow] = {}
    rows = []
    several = conditions.shard is not None
    with fake_processes(conditions.processes) if several else nullcontext():
        for label, loaded in cells:
            key = what_memory_depends_on(loaded.recipe)
            if key not in known:
                observer.phase("estimate", label)
                known[key] = _row(label, loaded, conditions, room)
            rows.append(known[key].changed(label=label, task=loaded.recipe.task.name))
    return EstimateRecord(
        command="estimate",
        conditions=EstimateConditions(
            kernels=conditions.kernels,
            padded=conditions.padded,
            processes=conditions.processes,
            shard=conditions.shard,
        ),
        room=None if room is None else DeviceRoom(**vars(room), most_examples=MOST),
        rows=rows,
        seconds=time.perf_counter() - started,
    )


def what_memory_depends_on(recipe: Recipe) -> str:
    """Return a string that is equal for recipes whose steps need the same memory."""
    plain = to_plain(recipe)
    train = {key: plain["train"][key] for key in _TRAIN}
    kept = ("model", "task", "method", "targets", "scope", "calibration")
    return json.dumps([{key: plain[key] for key in kept}, train])


def _row(
    label: str, loaded: LoadedRecipe, conditions: Conditions, room: Room | None
) -> EstimateRow:
    started = time.perf_counter()
    if conditions.shard == "fsdp2":
        check_recipe_sharding(loaded, FSDP)
    check_countable(loaded.recipe)
    config, source = configuration_of(loaded.recipe.model)
    notes = name_task(loaded.recipe, config)
    length, cut = fitting_length(loaded.recipe.task.max_length, config)
    notes += [cut] if cut else []
    loaded = changed(loaded, "task", max_length=length)
    loaded, autocast = _with_autocast(loaded)
    notes += [*autocast, *left_out(loaded.recipe)]
    if loaded.recipe.train.gradient_accumulation_steps > 1:
        notes.append("gradients of earlier micro-batches are in memory in forward and backward")
    recipe, train = loaded.recipe, loaded.recipe.train
    fake = FakeRun(loaded, config, conditions)
    size = train.per_device_train_batch_size
    with frozen_gc():
        meter = fake.step(size, length)
        peaks = {name: peak for name in STEP if (peak := meter.peak(name)) is not None}
        highest = max(peaks, key=lambda name: peaks[name].peak_bytes)
        most = peaks[highest].peak_bytes
        share = None if conditions.shard is None else _share(fake, conditions, peaks[highest])
        fit = None if room is None else _fit(fake, length, room, {size: most})
        own = recipe.calibration.batch_size or size
        calibration = fake.calibration(own)
        evaluation = fake.evaluation(train.per_device_eval_batch_size, length)
    counts = fake.prepared.counts
    return EstimateRow(
        label=label,
        task=recipe.task.name,
        model=EstimatedModel(
            name=recipe.model.name,
            configuration=source,
            parameters=fake.parameters,
            dtype=recipe.model.dtype,
        ),
        method=recipe.method.model_dump(exclude_none=True),
        counts=EstimatedCounts(
            trainable_targets=counts.trainable_targets,
            trainable_head=counts.trainable_head,
            trainable_rest=counts.trainable_rest,
            note=counts.note,
        ),
        batch_shape=[size, length],
        mask=mask_of(recipe, padded=conditions.padded),
        autocast=train.autocast,
        gradient_checkpointing=train.gradient_checkpointing,
        peak_bytes=most,
        peak_phase=highest,
        beyond_weights_bytes=most - fake.weights_bytes,
        categories=_categories(peaks[highest], fake),
        phases={name: peak.peak_bytes for name, peak in peaks.items()},
        calibrate_peak_bytes=_bytes(calibration),
        calibrate_batch=None if calibration is None else own,
        evaluate_peak_bytes=_bytes(evaluation.peak("evaluate")),
        evaluate_batch=train.per_device_eval_batch_size,
        fit=fit,
        share=share,
        notes=[*notes, *fake.notes],
        seconds=time.perf_counter() - started,
    )


def check_countable(recipe: Recipe) -> None:
    """Check that the memory of a recipe can be counted on fake tensors.

    Raises:
        UsageError: the base is quantized.
    """
    if recipe.model.quantization is not None:
        raise UsageError(
            "a quantized base cannot be estimated: bitsandbytes packs real numbers only",
            where="model.quantization",
            fix="leave it out here; docs/how-to/quantize-the-base.md says how much memory "
            "the weights then take",
        )


def _bytes(peak: PhasePeak | None) -> int | None:
    return None if peak is None else peak.peak_bytes


def _categories(peak: PhasePeak, fake: FakeRun) -> MemoryCategories:
    """Return the categories of a peak, with what the method added to the weights as ``adapter``.

    The method adds the values of an adapter, or the positions of a support. Of several processes,
    each holds its part of them, and the weights are those that it holds and those gathered.
    """
    added = fake.held_bytes - fake.weights_bytes
    weights = peak.categories["weights"] - added
    return MemoryCategories(**{**peak.categories, "weights": weights, "adapter": added})


def _share(fake: FakeRun, conditions: Conditions, peak: PhasePeak) -> ProcessShare:
    """Return what one process holds and sends, from the last step of a fake run."""
    n = conditions.processes
    collectives = [
        Collective(
            kind=kind,
            calls=sent.calls,
            payload_bytes=sent.payload_bytes,
            sent_bytes=sent.sent_bytes(kind, n),
        )
        for kind, sent in fake.sent.items()
        if sent.calls
    ]
    return ProcessShare(
        whole_weights_bytes=fake.whole_weights_bytes,
        gathered_bytes=max(0, peak.categories["weights"] - fake.held_bytes),
        collectives=collectives,
        sent_bytes=sum(collective.sent_bytes for collective in collectives),
    )


def _fit(fake: FakeRun, length: int, room: Room, known: Mapping[int, int]) -> LargestBatch:
    """Return the largest batch at which the step and the calibration before it both fit.

    Peaks of steps in ``known`` are not counted again. Calibration keeps its own batch if the recipe
    sets one. ``limited_by`` names the one that needs too much at the next larger batch.
    """
    own, taken = fake.recipe.calibration.batch_size, room.for_tensors

    @functools.cache
    def calibration(size: int) -> int:
        return _bytes(fake.calibration(size)) or 0

    @functools.cache
    def step(size: int) -> int:
        if size in known:
            return known[size]
        meter = fake.step(size, length)
        return max(p.peak_bytes for name in STEP if (p := meter.peak(name)) is not None)

    def peak(size: int) -> int:
        if step(size) > taken:
            return step(size)
        return max(step(size), calibration(own or size))

    batch, most = largest_batch(peak, taken)
    limit: Literal["step", "calibration"] | None = None
    if batch < MOST:
        limit = "step" if step(batch + 1) > taken else "calibration"
    return LargestBatch(batch=batch, length=length, peak_bytes=most, limited_by=limit)


def changed(loaded: LoadedRecipe, section: str, **settings: Any) -> LoadedRecipe:
    """Return the recipe with changed settings in one section."""
    before = getattr(loaded.recipe, section)
    changed = loaded.recipe.model_copy(update={section: before.model_copy(update=settings)})
    return replace(loaded, recipe=changed)


def _with_autocast(loaded: LoadedRecipe) -> tuple[LoadedRecipe, list[str]]:
    """Enable autocast if `train` requires it, because weights train in half precision."""
    try:
        check_precision(loaded)
    except UsageError:
        switch = "bf16" if loaded.recipe.model.dtype == "bfloat16" else "fp16"
        note = f"train.{switch}: true assumed, without which `train` refuses this method"
        return changed(loaded, "train", **{switch: True}), [note]
    return loaded, []


def left_out(recipe: Recipe) -> list[str]:
    """Return notes on the settings that a fake run of the recipe leaves out."""
    notes = []
    if recipe.train.torch_compile:
        notes.append("train.torch_compile is left out: what a compiler fuses is unknown here")
    if recipe.train.label_smoothing_factor:
        notes.append("train.label_smoothing_factor is left out")
    if recipe.train.class_weights is not None:
        notes.append("train.class_weights is left out")
    return notes
