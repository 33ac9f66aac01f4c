"""Detect whether a launcher asks for sharded weights, and refuse settings that cannot work then.

`accelerate launch` passes its configuration in environment variables, so everything is known before
anything is loaded. FSDP2 is torch's fully_shard. DeepSpeed's ZeRO shards inside its engine. Imports
no torch.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import NamedTuple

from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.recipe.load_recipe import LoadedRecipe
from sparsegrad_cli.recipe.schema import Recipe

FSDP, DEEPSPEED = "FSDP2", "DeepSpeed"
_SHARDED_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")
_WHOLE_WEIGHTS = (
    "lora, full, or sparsegrad with form: core and support: static or dense; or whole weights in "
    "each process (configs/accelerate/ddp.yaml)"
)
_CONFIG = "the file that accelerate launch was given (see configs/accelerate/fsdp2.yaml)"


class _Refusal(NamedTuple):
    """A setting that cannot work, and what to do; ``key`` is a recipe key or an option."""

    key: str
    what: str
    fix: str


# Switches of accelerate's FSDP that must be off: why, and the settings to use instead.
_FSDP_SWITCHES = {
    "FSDP_CPU_RAM_EFFICIENT_LOADING": (
        "with fsdp_cpu_ram_efficient_loading only the first process has weights, and all "
        "processes calibrate",
        "fsdp_cpu_ram_efficient_loading: false",
    ),
    "FSDP_ACTIVATION_CHECKPOINTING": (
        "fsdp_activation_checkpointing renames the parameters that checkpoints name",
        "fsdp_activation_checkpointing: false, and train.gradient_checkpointing: true",
    ),
    "FSDP_OFFLOAD_PARAMS": (
        "fsdp_offload_params keeps weights where they cannot be gathered from",
        "fsdp_offload_params: false",
    ),
}


def requested_sharding() -> str | None:
    """Return ``FSDP`` or ``DEEPSPEED`` if a launcher asks for sharded weights, otherwise None.

    As in accelerate, a launched run with a single process counts, too.
    """
    if "LOCAL_RANK" not in os.environ:
        return None
    if _is_on("ACCELERATE_USE_DEEPSPEED"):
        return DEEPSPEED
    return FSDP if _is_on("ACCELERATE_USE_FSDP") else None


def check_sharding(loaded: LoadedRecipe, command: str, *, resume: bool) -> None:
    """Refuse a recipe that cannot work with the launcher's settings, before anything is loaded.

    Args:
        loaded: The recipe.
        command: ``train`` or ``calibrate``; calibration ends before weights are sharded.
        resume: Whether the run is resumed.

    Raises:
        UsageError: Names the setting and an alternative.
    """
    how, recipe = requested_sharding(), loaded.recipe
    found = _launcher_refusal(recipe, how)
    if found is None and how is not None and command == "train":
        found = _recipe_refusal(recipe, how)
        if found is None and how == DEEPSPEED:
            found = _engine_refusal(recipe, resume=resume)
    if found is not None:
        raise _error(loaded, found)


def check_recipe_sharding(loaded: LoadedRecipe, how: str) -> None:
    """Refuse a recipe that cannot train on weights that ``how`` shards, whatever launches it.

    Args:
        loaded: The recipe.
        how: ``FSDP`` or ``DEEPSPEED``.

    Raises:
        UsageError: Names the setting and an alternative.
    """
    found = _recipe_refusal(loaded.recipe, how)
    if found is not None:
        raise _error(loaded, found)


def _error(loaded: LoadedRecipe, found: _Refusal) -> UsageError:
    in_recipe = found.key not in (_CONFIG, "--resume")
    where = loaded.where(found.key) if in_recipe else found.key
    return UsageError(found.what, where=where, fix=found.fix)


def _is_on(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1", "yes")


def _launcher_refusal(recipe: Recipe, how: str | None) -> _Refusal | None:
    """Check the launcher's own settings."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    own = "bf16" if recipe.train.bf16 else "fp16" if recipe.train.fp16 else "no"
    if "LOCAL_RANK" in os.environ and launched not in ("no", own):
        # The launcher would override the recipe, and the record would be wrong.
        what = f"the launcher sets mixed precision {launched}, the recipe {own}"
        fix = f"mixed_precision: 'no' there, or train.{launched}: true in the recipe"
        return _Refusal(_CONFIG, what, fix)
    if how == FSDP:
        return _fsdp_refusal()
    if how == DEEPSPEED and find_spec("deepspeed") is None:
        what = "DeepSpeed was asked for and is not installed"
        return _Refusal(_CONFIG, what, "pip install deepspeed; or FSDP2, which needs nothing else")
    if how == DEEPSPEED and _is_on("ACCELERATE_DEEPSPEED_ZERO3_INIT"):
        what = "with zero3_init_flag no process has whole weights to calibrate with"
        return _Refusal(_CONFIG, what, "zero3_init_flag: false")
    return None


def _fsdp_refusal() -> _Refusal | None:
    if os.environ.get("FSDP_VERSION", "1") != "2":
        what = "FSDP version 1 flattens parameters: they lose name and shape"
        return _Refusal(_CONFIG, what, "fsdp_version: 2")
    if os.environ.get("FSDP_AUTO_WRAP_POLICY", "").upper() == "SIZE_BASED_WRAP":
        what = "by size accelerate also wraps lists of blocks, which torch's fully_shard refuses"
        return _Refusal(_CONFIG, what, "fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP")
    on = next((name for name in _FSDP_SWITCHES if _is_on(name)), None)
    return None if on is None else _Refusal(_CONFIG, *_FSDP_SWITCHES[on])


def _recipe_refusal(recipe: Recipe, how: str) -> _Refusal | None:
    """Check settings that neither FSDP2 nor DeepSpeed supports."""
    refused = recipe.method.sharding_refusal(how)
    if refused is not None:
        key, what = refused
        return _Refusal(f"method.{key}", what, _WHOLE_WEIGHTS)
    bits = recipe.model.quantization
    if bits is not None:
        what = f"{how} cannot shard weights of {bits}: every process would hold all of them"
        fix = "configs/accelerate/ddp.yaml, or weights that are not quantized"
        return _Refusal("model.quantization", what, fix)
    if recipe.train.fp16:
        what = f"fp16 with {how} has never been tried"
        return _Refusal("train.fp16", what, "train.bf16: true")
    if recipe.train.optim not in _SHARDED_OPTIMIZERS:
        what = f"{recipe.train.optim} with {how} has never been tried"
        return _Refusal("train.optim", what, "train.optim: adamw_torch")
    if recipe.train.torch_compile:
        what = f"torch_compile with {how} has never been tried"
        return _Refusal("train.torch_compile", what, "leave it out")
    return None


def _engine_refusal(recipe: Recipe, *, resume: bool) -> _Refusal | None:
    """Check settings that DeepSpeed's engine does not support."""
    train = recipe.train
    if train.bf16:
        what = "DeepSpeed turns all weights into bfloat16, also those that train"
        fix = "model.dtype: bfloat16, with which lora and the core train float32; or FSDP2"
        return _Refusal("train.bf16", what, fix)
    if (train.save_strategy or train.eval_strategy) != "no":
        what = "DeepSpeed's checkpoints are pickles of its engine, which this tool does not write"
        fix = "train.save_strategy: no; the adapter is written at the end"
        return _Refusal("train.save_strategy", what, fix)
    if resume:
        what = "a run under DeepSpeed cannot be resumed: it writes no checkpoints"
        return _Refusal("--resume", what, "--overwrite, or FSDP2")
    return None
