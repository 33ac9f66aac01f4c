"""Train in two real processes, and count what each of them holds and sends."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from sparsegrad_cli.memory.collectives import CollectiveCounter
from sparsegrad_cli.training.optimizer_steps import OptimizerSteps
from sparsegrad_cli.training.train import train
from support import fsdp_runs
from support.fsdp_runs import batch_settings, fsdp_requested, joined_process_group, recipe_of

METHODS = {**fsdp_runs.METHODS, "dora": ("method=dora",)}
# Name -> how the model is shared, model, method, micro-batches.
CELLS: dict[str, tuple[str, str, str, int]] = {
    "fsdp2 static": ("fsdp2", "bert", "static", 1),
    "fsdp2 lora": ("fsdp2", "bert", "lora", 1),
    "fsdp2 full": ("fsdp2", "bert", "full", 2),
    "fsdp2 tied": ("fsdp2", "gpt2", "dense", 1),
    "ddp static": ("ddp", "bert", "static", 2),
    "ddp lora": ("ddp", "bert", "lora", 1),
    "ddp full": ("ddp", "bert", "full", 1),
    "ddp dora": ("ddp", "bert", "dora", 1),
}
# Padding is computed, because an estimate does not know it; gradients are not clipped, whose norm
# is one more number to sum.
SETTINGS = ("train.unpadded=false", "train.max_grad_norm=0")


def settings(name: str) -> tuple[str, ...]:
    """Return the settings of a cell beside those of :func:`support.fsdp_runs.recipe_of`."""
    _, _, method, micro_batches = CELLS[name]
    return (*METHODS[method], *batch_settings(4, micro_batches), *SETTINGS)


def count_two(rank: int, folder: str) -> None:
    """Train every cell in one of the two processes; rank zero writes ``counted.json``."""
    with joined_process_group(rank, folder):
        found = {name: _counted(name) for name in CELLS}
        if rank == 0:
            Path("counted.json").write_text(json.dumps(found))


def _counted(name: str) -> dict[str, Any]:
    """Return kind of collective -> [calls, bytes] in the second step, and the recorded memory."""
    shard, model, _, _ = CELLS[name]
    counters: list[CollectiveCounter] = []
    plain = OptimizerSteps.take

    def take(self: OptimizerSteps, *arguments: Any) -> None:
        with CollectiveCounter() as counter:
            plain(self, *arguments)
        counters.append(counter)

    OptimizerSteps.take = take  # type: ignore[assignment,method-assign]
    try:
        with fsdp_requested() if shard == "fsdp2" else nullcontext():
            output = f"output_dir={name.replace(' ', '-')}"
            record = train(recipe_of(model, *settings(name), output)).to_json()
    finally:
        OptimizerSteps.take = plain  # type: ignore[method-assign]
    # After the second step the run evaluates, which leaves FSDP2's root gathered for the third.
    sent = {kind: [s.calls, s.payload_bytes] for kind, s in counters[1].sent.items()}
    return {"sent": sent, "memory": record["memory"]}
