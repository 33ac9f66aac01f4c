"""Runs whose weights are split over processes, as a launcher asks for them, and what they refuse.

`accelerate launch` hands its configuration on in the environment, so all of this is known before
anything is loaded. FSDP2 is torch's fully_shard; DeepSpeed's ZeRO splits inside its engine. Imports
no torch.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

from sparsegrad_cli import distributed
from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.recipe.load_recipe import LoadedRecipe
from sparsegrad_cli.recipe.schema import Recipe

FSDP, DEEPSPEED = "FSDP2", "DeepSpeed"
_WHOLE = (
    "lora, full, or sparsegrad with form: core and support: static or dense; or each process with "
    "all weights (configs/accelerate/ddp.yaml)"
)
_CONFIG = "the file that accelerate launch was given (see configs/accelerate/fsdp2.yaml)"


def asked() -> str | None:
    """``FSDP``, ``DEEPSPEED``, or None where every process holds all weights.

    By the rule of accelerate, which splits the weights of a single process too, if it was launched.
    """
    if "LOCAL_RANK" not in os.environ:
        return None
    if _said("ACCELERATE_USE_DEEPSPEED"):
        return DEEPSPEED
    return FSDP if _said("ACCELERATE_USE_FSDP") else None


def check_sharding(loaded: LoadedRecipe, command: str, *, resume: bool) -> None:
    """What cannot work on split weights, or as a launcher has it, before anything is loaded.

    Raises:
        UsageError: says what does work.
    """
    _check_precision(loaded)
    how = asked()
    if how is None:
        return
    launcher = _fsdp_problem() if how == FSDP else _deepspeed_problem()
    if launcher is not None:
        what, fix = launcher
        distributed.raise_on_rank_zero(UsageError(what, where=_CONFIG, fix=fix))
    if command != "train":
        return  # calibration is over before anything is split
    for problem in (_recipe_problem, *((_engine_problem,) if how == DEEPSPEED else ())):
        found = problem(loaded.recipe, how)
        if found is not None:
            key, what, fix = found
            distributed.raise_on_rank_zero(UsageError(what, where=loaded.where(key), fix=fix))
    if how == DEEPSPEED and resume:
        what = "a run under DeepSpeed cannot go on from a checkpoint: it writes none"
        distributed.raise_on_rank_zero(
            UsageError(what, where="--resume", fix="--overwrite, or FSDP2")
        )


def _check_precision(loaded: LoadedRecipe) -> None:
    """A launcher's mixed precision would go past the recipe, and past the record."""
    launched, train = os.environ.get("ACCELERATE_MIXED_PRECISION", "no"), loaded.recipe.train
    own = "bf16" if train.bf16 else "fp16" if train.fp16 else "no"
    if "LOCAL_RANK" in os.environ and launched not in ("no", own):
        fix = f"mixed_precision: 'no' there, and train.{launched}: true in the recipe if so wanted"
        what = f"the launcher says mixed precision {launched}, the recipe {own}"
        distributed.raise_on_rank_zero(UsageError(what, where=_CONFIG, fix=fix))


def _said(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1", "yes")


def _fsdp_problem() -> tuple[str, str] | None:
    """(what, fix) of accelerate's settings of FSDP."""
    if os.environ.get("FSDP_VERSION", "1") != "2":
        return "FSDP's version 1 flattens parameters: they lose name and shape", "fsdp_version: 2"
    if os.environ.get("FSDP_AUTO_WRAP_POLICY", "").upper() == "SIZE_BASED_WRAP":
        what = "by size accelerate also wraps lists of blocks, which torch's fully_shard refuses"
        return what, "fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP"
    # Each names the switch, why it cannot be on, and what to write instead.
    switches = (
        (
            "FSDP_CPU_RAM_EFFICIENT_LOADING",
            "with fsdp_cpu_ram_efficient_loading the first process alone has weights, and all of "
            "them calibrate",
            "fsdp_cpu_ram_efficient_loading: false",
        ),
        (
            "FSDP_ACTIVATION_CHECKPOINTING",
            "fsdp_activation_checkpointing renames the parameters that checkpoints go by",
            "fsdp_activation_checkpointing: false, and train.gradient_checkpointing: true",
        ),
        (
            "FSDP_OFFLOAD_PARAMS",
            "fsdp_offload_params keeps weights where they cannot be gathered from",
            "fsdp_offload_params: false",
        ),
    )
    return next(((what, fix) for name, what, fix in switches if _said(name)), None)


def _deepspeed_problem() -> tuple[str, str] | None:
    """(what, fix) of DeepSpeed's settings."""
    if find_spec("deepspeed") is None:
        fix = "pip install deepspeed; or FSDP2, which needs nothing else"
        return "DeepSpeed was asked for, and is not installed", fix
    if _said("ACCELERATE_DEEPSPEED_ZERO3_INIT"):
        what = "with zero3_init_flag no process has whole weights to calibrate with"
        return what, "zero3_init_flag: false"
    return None


def _recipe_problem(recipe: Recipe, how: str) -> tuple[str, str, str] | None:
    """(key, what, fix) of what no way of splitting allows."""
    train, refusal = recipe.train, recipe.method.sharding_refusal(how)
    if refusal is not None:
        key, what = refusal
        return f"method.{key}", what, _WHOLE
    if recipe.model.quantization is not None:
        bits = recipe.model.quantization
        what = f"{how} cannot split weights of {bits}: every process would hold all of them"
        return "model.quantization", what, "configs/accelerate/ddp.yaml, or plain weights"
    if train.fp16:
        return "train.fp16", f"fp16 with {how} has never been tried", "train.bf16: true"
    if train.torch_compile:
        what = f"torch_compile with {how} has never been tried"
        return "train.torch_compile", what, "leave it out"
    return None


def _engine_problem(recipe: Recipe, how: str) -> tuple[str, str, str] | None:
    """(key, what, fix) of what DeepSpeed's engine does by itself."""
    train = recipe.train
    if train.bf16:
        what = f"{how} turns all weights into bfloat16, also those that train"
        fix = "model.dtype: bfloat16, beside which lora and the core keep float32; or FSDP2"
        return "train.bf16", what, fix
    if (train.save_strategy or train.eval_strategy) != "no":
        what = f"checkpoints of {how} are pickles of its engine, which this tool does not write"
        fix = "train.save_strategy: no; the adapter is written at the end"
        return "train.save_strategy", what, fix
    return None
