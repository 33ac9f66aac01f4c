"""Check the dtypes of a recipe, and record the dtypes that a run computes in."""

from __future__ import annotations

import time
from collections import Counter

import torch
from torch import nn

from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.recipe.load_recipe import LoadedRecipe
from sparsegrad_cli.recipe.schema import TrainSection
from sparsegrad_cli.records.run import PrecisionBlock

_CLEARLY_SLOWER = 1.2  # Times of one product vary by less.


def check_precision(loaded: LoadedRecipe) -> None:
    """Refuse half-precision weights without autocast if some of the weights are trained.

    Trained parameters are kept in float32, and products of float32 and half-precision tensors need
    autocast.

    Raises:
        UsageError: names ``model.dtype``.
    """
    recipe, method = loaded.recipe, loaded.recipe.method
    leaves_weights = method.beside_weights and recipe.scope == "head"
    if recipe.model.dtype != "float32" and not recipe.train.autocast and not leaves_weights:
        raise UsageError(
            f"method {recipe.method.name} trains the model's own weights, kept in float32 "
            f"beside others in {recipe.model.dtype}: products of the two need autocast",
            where=loaded.where("model.dtype"),
            fix="train.bf16: true, or model.dtype: float32; lora and sparsegrad's form: core leave "
            "the weights alone",
        )


def check_autocast(loaded: LoadedRecipe) -> None:
    """Refuse autocast that this machine does not support, before model and data are loaded.

    Raises:
        UsageError: names ``train.bf16`` or ``train.fp16``.
    """
    from transformers.utils import is_torch_bf16_gpu_available

    train = loaded.recipe.train
    on_gpu = torch.cuda.is_available() and not train.use_cpu
    if train.bf16 and on_gpu and not is_torch_bf16_gpu_available():
        raise UsageError(
            "the GPU here does not support bfloat16",
            where=loaded.where("train.bf16"),
            fix="train.use_cpu: true trains in bfloat16 on the CPU; or leave it out",
        )
    if train.fp16 and (train.use_cpu or not torch.cuda.is_available()):
        raise UsageError(
            "float16 needs a GPU, and the recipe trains on the CPU",
            where=loaded.where("train.fp16"),
            fix="train.bf16: true, which CPUs have too, or leave it out",
        )


def slow_bfloat16(train: TrainSection, device: torch.device) -> str | None:
    """Return a note if this CPU is slower in bfloat16 than in float32; it is timed."""
    if not train.bf16 or device.type != "cpu":
        return None
    ratio = _product_seconds(torch.bfloat16) / _product_seconds(torch.float32)
    if ratio <= _CLEARLY_SLOWER:
        return None
    return (
        f"train.bf16: a product in bfloat16 takes {ratio:.1f} times as long as in float32 on this "
        "CPU; leave it out"
    )


def _product_seconds(dtype: torch.dtype) -> float:
    """Return the shortest time of a few products, (256, 512) @ (512, 512)."""
    x, weight = torch.ones(256, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        torch.mm(x, weight)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def precision_of(model: nn.Module, train: TrainSection, device: torch.device) -> PrecisionBlock:
    """Return the ``precision`` block of the record.

    Args:
        model: as loaded, before the method has changed it.
    """
    weights: Counter[str] = Counter()
    for parameter in model.parameters():
        weights[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    return PrecisionBlock(
        weights=dict(sorted(weights.items())),
        autocast=train.autocast,
        matmul=torch.get_float32_matmul_precision(),
        device=device.type,
    )
