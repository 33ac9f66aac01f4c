"""Training in two CPU processes with FSDP2: inputs, settings and process setup."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sparsegrad_cli.progress import Observer
from sparsegrad_cli.recipe.load_recipe import LoadedRecipe, load_recipe
from sparsegrad_cli.training.train import train as train_recipe
from support.chat_models import byte_tokenizer, chat_model_folder
from support.small_runs import base_folder, data_folder
from support.tiny_models import build, config

# What `accelerate launch --config_file configs/accelerate/fsdp2.yaml` puts into the environment.
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
METHODS = {
    "static": ("method.rank=8", "method.support=static", "method.density=0.02"),
    "dense": ("method.rank=6", "method.support=dense"),
    "lora": ("method=lora", "method.dropout=0"),
    "full": ("method=full",),
}
STEPS, BATCH = 3, 8
_SETTINGS = (
    f"train.max_steps={STEPS}",
    "train.eval_strategy=no",
    "train.save_strategy=no",
    "train.logging_steps=1",
    # Far above every gradient: steps are proportional to gradients, so a wrong factor shows.
    "train.adam_epsilon=1",
    "train.learning_rate=0.5",
    "train.use_cpu=true",
    "calibration.steps=4",
    "calibration.batch_size=2",
    "calibration.warmup_steps=0",
)
# Three validation rows: one process has two of them, the other has one.
_CHAT = "task={name: chat, path: d.jsonl, max_length: 96, eval_limit: 3}"
TASKS = {
    "bert": ("model=bert", "task={name: csv, path: classes, max_length: 16, eval_limit: 5}"),
    "llama": ("model=llama", _CHAT),
    "gpt2": ("model=gpt2", _CHAT),
}


def make_inputs(folder: Path) -> Path:
    """Make the tasks and models, without dropout, which would differ between processes."""
    from transformers import AutoModelForCausalLM

    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    base_folder(folder / "bert", "bert", **still)
    data_folder(folder / "classes")
    chat_model_folder(folder / "llama", positions=128)
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    settings = config("gpt2", vocab_size=260, n_positions=128, initializer_range=0.3, **still)
    tied: Any = build(AutoModelForCausalLM, settings, 3)
    tied.save_pretrained(folder / "gpt2")
    byte_tokenizer().save_pretrained(folder / "gpt2")
    rows = (
        f'{{"prompt": "{n}. Who?", "completion": "{"yes " * 17 if n % 5 == 0 else "no"}"}}\n'
        for n in range(40)
    )
    (folder / "d.jsonl").write_text("".join(rows))
    return folder


def batch_settings(size: int, micro_batches: int) -> tuple[str, ...]:
    """Return the batch settings of one process."""
    return (
        f"train.per_device_train_batch_size={size}",
        f"train.gradient_accumulation_steps={micro_batches}",
    )


def train_run(
    model: str,
    method: str,
    run: str,
    *more: str,
    resume: bool = False,
    observer: Observer | None = None,
) -> dict[str, Any]:
    """Train in the working folder as the command does, and return run.json."""
    return train_recipe(
        recipe_of(model, *METHODS[method], *more, f"output_dir={run}"), observer, resume=resume
    ).to_json()


def recipe_of(model: str, *settings: str) -> LoadedRecipe:
    """Return a recipe for one of the models, which is read in the working folder."""
    return load_recipe(None, (*TASKS[model], *_SETTINGS, *settings))


@contextmanager
def joined_process_group(rank: int, folder: str) -> Iterator[None]:
    """Join the group as `torchrun --nproc-per-node 2` does, and exit the process at the end."""
    said = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({key: str(value) for key, value in said.items()}, HF_HUB_OFFLINE="1")
    os.chdir(folder)
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    yield
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    # A normal exit races with gloo's threads. Everything that tests read is on disk by now.
    os._exit(0)


@contextmanager
def fsdp_requested(*, on_cpu: bool = True) -> Iterator[None]:
    """Request FSDP2 as a launcher does; without it, training uses DDP.

    Args:
        on_cpu: make accelerate take its FSDP branch on the CPU, which it otherwise takes only on
            accelerators. Nothing else in accelerate is patched.
    """
    from accelerate import PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    plain = AcceleratorState.__init__

    def patched(self: Any, *args: Any, **more: Any) -> None:
        shared = PartialState(cpu=True)._shared_state
        if shared["distributed_type"] == DistributedType.MULTI_CPU:
            shared["distributed_type"] = DistributedType.MULTI_GPU
        plain(self, *args, **more)

    os.environ.update(FSDP2)
    AcceleratorState.__init__ = patched if on_cpu else plain
    try:
        yield
    finally:
        AcceleratorState.__init__ = plain
        for name in FSDP2:
            del os.environ[name]
