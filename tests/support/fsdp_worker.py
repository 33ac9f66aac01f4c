"""The program of each of the two FSDP2 processes; it writes its findings to a file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad_cli.errors import NonFiniteError
from sparsegrad_cli.methods.implementation import load_by_name, trainable_state
from sparsegrad_cli.models.nan_check import check_weights
from sparsegrad_cli.models.sharded_tensors import is_split
from sparsegrad_cli.progress import Observer
from support.fsdp_runs import (
    METHODS,
    batch_settings,
    fsdp_requested,
    joined_process_group,
    train_run,
)

CELLS = [(model, method) for model in ("bert", "llama") for method in METHODS]
# Compared with whole weights: frozen half-precision weights beside float32 values, autocast, and a
# model whose embeddings are its head.
COMPARED = {
    "frozen": ("llama", "static", "model.dtype=bfloat16"),
    "frozen-lora": ("bert", "lora", "model.dtype=bfloat16"),
    "autocast": ("llama", "full", "train.bf16=true"),
    "both": ("llama", "dense", "model.dtype=bfloat16", "train.bf16=true"),
    "tied": ("gpt2", "full", "scope=rest"),
    "tied-core": ("gpt2", "static"),
}
SAVING = (
    "train.max_steps=4",
    "train.eval_strategy=steps",
    "train.eval_steps=2",
    "train.save_strategy=steps",
    "train.save_steps=2",
    "train.save_total_limit=3",
    "train.load_best_model_at_end=true",
    "train.lr_scheduler_type=linear",
    "train.learning_rate=20",  # so far that the last weights are not the best
)
FILES = ("trainable.safetensors", "optimizer.safetensors")


def one_of_two(rank: int, folder: str) -> None:
    """Run all cases in one of the two processes, and write ``rank<n>.json``."""
    with joined_process_group(rank, folder):
        found: dict[str, Any] = {"diverged": _diverged(), "lost": _lost_shard(rank)}
        with fsdp_requested():
            for model, method in CELLS:
                train_run(model, method, f"two-{model}-{method}", *batch_settings(2, 2))
            recomputed = ("train.gradient_checkpointing=true", "method.recompute=activation")
            train_run("llama", "dense", "recomputed", *batch_settings(2, 2), *recomputed)
            train_run("llama", "lora", "clipped", *batch_settings(2, 2), "train.max_grad_norm=0.01")
        for name, (model, method, *more) in COMPARED.items():
            with fsdp_requested():
                train_run(model, method, f"split-{name}", *batch_settings(4, 1), *more)
            train_run(model, method, f"whole-{name}", *batch_settings(4, 1), *more)
        for method in ("static", "full"):
            _stopped_and_resumed(rank, method)
        found["pieces"] = _pieces(rank)
        found["notes"] = _on_the_cpu_as_it_is()
        Path(f"rank{rank}.json").write_text(json.dumps(found))


def _stopped_and_resumed(rank: int, method: str) -> None:
    """Train four steps, then resume from step 2 once with FSDP2 and once without."""
    with fsdp_requested():
        train_run("llama", method, f"straight-{method}", *batch_settings(4, 1), *SAVING)
    if rank == 0:
        for way in ("split", "whole"):
            left = Path(shutil.copytree(f"straight-{method}", f"resumed-{way}-{method}"))
            shutil.rmtree(left / "checkpoint-4")
            shutil.rmtree(left / "adapter")
    torch.distributed.barrier()
    with fsdp_requested():
        train_run(
            "llama", method, f"resumed-split-{method}", *batch_settings(4, 1), *SAVING, resume=True
        )
    train_run(
        "llama", method, f"resumed-whole-{method}", *batch_settings(4, 1), *SAVING, resume=True
    )


def _diverged() -> dict[str, Any]:
    """Check that a NaN loss ends all processes, which search for the module together."""
    try:
        with fsdp_requested():
            train_run("bert", "full", "diverged", *batch_settings(4, 1), "train.learning_rate=1e30")
    except NonFiniteError as error:
        return error.details
    return {}


class _Listening(Observer):
    """Collects the notes of a run."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def _on_the_cpu_as_it_is() -> list[str]:
    """Return the notes of a run that requests FSDP2 where accelerate does not apply it."""
    heard = _Listening()
    with fsdp_requested(on_cpu=False):
        train_run("bert", "lora", "unsplit", *batch_settings(4, 1), observer=heard)
    return heard.notes


class _Odd(nn.Module):
    """Three rows for two processes, and a parameter without entries."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(15.0).view(3, 5))
        self.empty = nn.Parameter(torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.empty.sum()


def _split_odd() -> Any:
    from torch.distributed.fsdp import fully_shard

    return fully_shard(_Odd())


def _lost_shard(rank: int) -> str:
    """Check that both processes find a NaN in the shard of one."""
    model = _split_odd()
    check_weights(model, 1)
    with torch.no_grad():
        if rank == 1:
            model.weight.to_local().fill_(float("nan"))
    try:
        check_weights(model, 1)
    except NonFiniteError as error:
        return str(error.details["parameter"])
    return ""


def _pieces(rank: int) -> list[Any]:
    """Load and save weights of a model that is unsharded after a forward pass."""
    model = _split_odd()
    model.eval()
    with torch.no_grad():
        model(torch.ones(1, 5))
    whole_by_now = not is_split(model.weight)
    load_by_name(model, {"weight": -torch.arange(15.0).view(3, 5)})
    kept = trainable_state(model)
    rows = len(model.weight.to_local())
    with torch.no_grad():
        out = model(torch.ones(1, 5)).tolist()
    values = kept["weight"].tolist() if rank == 0 else str(kept["weight"].device)
    return [whole_by_now, rows, list(kept["empty"].shape), values, out]
