"""The result of `estimate`: predicted memory of a training step."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from sparsegrad_cli.records.base import Block, Bytes, Count, Seconds
from sparsegrad_cli.records.run import MemoryCategories


class EstimateConditions(Block):
    """Assumptions besides the recipes."""

    kernels: str = Field(description="Kernels whose memory is counted: cpu or cuda.")
    padded: bool = Field(description="Whether batches have padding, and attention a mask.")
    processes: Count = Field(1, description="Memory and batches are those of one of them.")
    shard: Literal["ddp", "fsdp2"] | None = Field(
        None,
        description="What the processes share: the batch (ddp), or the weights, too (fsdp2); null "
        "for a single process.",
    )


class DeviceRoom(Block):
    """The memory of the device that batches must fit into."""

    total_bytes: Bytes
    overhead_bytes: Bytes = Field(description="Used before any tensor: CUDA context and kernels.")
    most_examples: Count = Field(description="The largest batch that is tried.")


class EstimatedModel(Block):
    """The model; only its configuration is read."""

    name: str
    configuration: str = Field(description="Where the configuration came from.")
    parameters: Count
    dtype: str


class EstimatedCounts(Block):
    """Number of trainable parameters."""

    trainable_targets: Count
    trainable_head: Count
    trainable_rest: Count
    note: str = ""


class LargestBatch(Block):
    """The largest batch that fits."""

    batch: Count
    length: Count
    peak_bytes: Bytes | None = None
    limited_by: Literal["step", "calibration"] | None = Field(
        None, description="What does not fit at the next larger batch."
    )


class Collective(Block):
    """The collectives of one kind in an optimizer step."""

    kind: Literal["all_gather", "reduce_scatter", "all_reduce"]
    calls: Count
    payload_bytes: Bytes = Field(
        description="Whole tensors that are gathered, or that each process adds to the sum."
    )
    sent_bytes: Bytes = Field(
        description="Sent by one process in a ring of n: (n - 1) / n of the payload; twice that in "
        "an all-reduce."
    )


class ProcessShare(Block):
    """What one of several processes holds and sends."""

    whole_weights_bytes: Bytes = Field(
        description="The base model's weights. Each process holds them all before training."
    )
    gathered_bytes: Bytes = Field(
        description="Weights of other processes at the peak, gathered for a layer."
    )
    collectives: list[Collective]
    sent_bytes: Bytes = Field(
        description="Sent by one process in an optimizer step, with all its micro-batches."
    )


class EstimateRow(Block):
    """The memory of one recipe."""

    label: str
    task: str
    model: EstimatedModel
    method: dict[str, Any] = Field(description="The method's section of the recipe.")
    counts: EstimatedCounts
    batch_shape: list[Count] = Field(description="Examples x tokens.")
    mask: str | None = Field(
        None, description="Why attention needs a mask: padding, packing or none."
    )
    autocast: str | None = None
    gradient_checkpointing: bool = False
    peak_bytes: Bytes
    peak_phase: str
    beyond_weights_bytes: int = Field(
        description="The peak beyond the base model's weights that the process holds."
    )
    categories: MemoryCategories = Field(description="At the peak.")
    phases: dict[str, Bytes] = Field(description="Peak of each phase.")
    calibrate_peak_bytes: Bytes | None = None
    calibrate_batch: Count | None = None
    evaluate_peak_bytes: Bytes | None = None
    evaluate_batch: Count | None = None
    fit: LargestBatch | None = None
    share: ProcessShare | None = Field(None, description="With several processes.")
    notes: list[str] = []
    seconds: Seconds = None


class EstimateRecord(Block):
    """Output of `estimate --json`."""

    command: Literal["estimate"] = "estimate"
    conditions: EstimateConditions
    room: DeviceRoom | None = None
    rows: list[EstimateRow]
    seconds: Seconds = None
