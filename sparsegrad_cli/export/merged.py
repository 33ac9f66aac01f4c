"""Write the merged form: a model of transformers with the change in its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import GenerationConfig

from sparsegrad_cli.errors import SparsegradError
from sparsegrad_cli.export.base_model import (
    LANGUAGE_MODEL,
    auto_class,
    changed_parameters,
    plain_model,
    put,
)
from sparsegrad_cli.models.quantized import quantized_layers
from sparsegrad_cli.models.targets import Target
from sparsegrad_cli.restore.restore import TrainedModel
from sparsegrad_cli.tasks.answerer import ChatPrompts, stop_tokens

SHARD_SIZE = "5GB"


@dataclass
class RelativeError:
    """The Frobenius norm of errors relative to that of the trained change, over all targets.

    Attributes:
        error: Sum of the squared errors.
        change: Sum of the squared changes.
    """

    error: float = 0.0
    change: float = 0.0

    def add(self, error_OI: Tensor, change_OI: Tensor) -> float:
        """Add a target; return its own ||error|| / ||change||, which is 0 without an error."""
        error, change = float(error_OI.square().sum()), float(change_OI.square().sum())
        self.error += error
        self.change += change
        return _ratio(error, change)

    @property
    def value(self) -> float:
        """||error|| / ||change|| over all targets."""
        return _ratio(self.error, self.change)


def _ratio(error: float, change: float) -> float:
    if error == 0:
        return 0.0
    return (error / change) ** 0.5 if change else float("inf")


def merge(trained: TrainedModel) -> tuple[nn.Module, dict[str, Any]]:
    """Return the plain model with the change merged into its weights, and the rounding errors."""
    plain = plain_model(trained)
    put(plain, changed_parameters(plain, trained))
    total, rows = RelativeError(), []
    for target in trained.setup.targets:
        weight_OI = trained.method.merged_OI(trained.setup.model, target)
        rounding_OI, change_OI = put_weight(plain, target, weight_OI)
        bias = trained.method.merged_bias(trained.setup.model, target)
        if bias is not None:
            put(plain, {f"{target.name}.bias": bias})
        relative = total.add(rounding_OI, change_OI)
        largest = float(rounding_OI.abs().max())
        rows.append({"name": target.name, "rounding": relative, "rounding_max": largest})
    quantized = quantized_layers(trained.setup.model)
    return plain, {
        "dtype": str(next(plain.parameters()).dtype).removeprefix("torch."),
        "rounding": total.value,
        "dequantized": len(quantized) if quantized else None,
        "targets": rows,
    }


def put_weight(plain: nn.Module, target: Target, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Copy a float64 weight into the plain model's layer, rounding it to the layer's dtype.

    Returns:
        (rounding error, change of the layer's weight), both (out, in) in float64.
    """
    held_OI = target.in_model(plain).weight_OI(plain).detach()  # A view of the parameter.
    change_OI = weight_OI - held_OI.double()
    with torch.no_grad():
        held_OI.copy_(weight_OI)
    return held_OI.double() - weight_OI, change_OI


def write_merged(plain: Any, tokenizer: Any, folder: Path) -> None:
    """Write sharded safetensors, configurations, tokenizer and chat template."""
    if auto_class(plain) == LANGUAGE_MODEL:
        plain.generation_config = generation_config(plain, tokenizer)
    plain.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    tokenizer.save_pretrained(folder)


def generation_config(plain: Any, tokenizer: Any) -> GenerationConfig:
    """Return the model's generation settings, plus the end-of-turn token of the chat template.

    A model that was trained on turns ends them with that token.
    """
    stops = stop_tokens(plain, ChatPrompts(tokenizer))
    # Make a new object. Otherwise transformers derives it from the model's configuration again.
    own = {k: v for k, v in plain.generation_config.to_dict().items() if not k.startswith("_")}
    stop: Any = stops if len(stops) != 1 else stops[0]
    config: GenerationConfig = GenerationConfig.from_dict({**own, "eos_token_id": stop or None})
    return config


def load_merged(auto: str, folder: Path, *, trust_remote_code: bool) -> nn.Module:
    """Load a written folder with transformers and check that every key was used.

    Raises:
        SparsegradError: A parameter is missing in the folder, or the model has no place for one.
    """
    model, info = getattr(transformers, auto).from_pretrained(
        folder, output_loading_info=True, trust_remote_code=trust_remote_code
    )
    wrong = {what: sorted(map(str, keys)) for what, keys in info.items() if keys}
    if wrong:
        what, keys = next(iter(wrong.items()))
        raise SparsegradError(f"the written folder does not fit its model: {what}: {keys[0]}")
    loaded: nn.Module = model
    return loaded
