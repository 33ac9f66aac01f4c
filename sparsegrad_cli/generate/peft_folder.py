"""A PEFT adapter's folder from anywhere: what it names, and its weights on a base model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from sparsegrad_cli.errors import FileFormatError
from sparsegrad_cli.io.bounded_json import plain_json
from sparsegrad_cli.io.paths import is_file

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_MARK = "lora_"  # in the names of what LoRA and its kin train in a layer


def base_of(folder: Path) -> tuple[str, str | None]:
    """(name, revision) of the model that the adapter goes onto.

    Raises:
        FileFormatError: the configuration is damaged, or asks for another library's code; or the
            weights are not safetensors, and are not read.
    """
    path = folder / CONFIG
    try:
        config = plain_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise _unfit(f"is no {CONFIG}: {error}", path) from error
    config = config if isinstance(config, dict) else {}
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(base, str) or not base.strip() or not isinstance(revision, str | None):
        raise _unfit("names no base model", path)
    if config.get("megatron_config") is not None:
        raise _unfit("asks for Megatron's modules, which are not loaded here", path)
    if not is_file(folder / TENSORS):
        raise _unfit(
            f"peft cannot load it: there is no {TENSORS}, and nothing else is read", folder
        )
    return base, revision


def on_base(model: nn.Module, folder: Path) -> nn.Module:
    """The model with the adapter on, as peft loads it.

    Raises:
        FileFormatError: peft cannot load it, or would leave out what it holds or lacks.
    """
    from peft import PeftModel, get_peft_model_state_dict

    try:
        tensors = load_file(folder / TENSORS)
    except (OSError, SafetensorError, ValueError) as error:
        raise _unfit(f"cannot be read: {error}", folder / TENSORS) from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise _unfit(f"{name} holds values that are not finite", folder / TENSORS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of peft and transformers about each other
            wrapped: Any = PeftModel.from_pretrained(model, str(folder))
            trained = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    except Exception as error:  # of peft, torch or safetensors: whatever they make of the files
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise _unfit(f"peft cannot load it: {reason}", folder) from error
    # peft passes over names that it does not know, and starts afresh where one is missing.
    there, wanted = ({n for n in names if _MARK in n} for names in (tensors, trained))
    if there != wanted:
        name = min(there ^ wanted)
        what = f"{name} {'is missing' if name in wanted else 'does not belong'}"
        raise _unfit(f"the adapter does not fit its configuration: {what}", folder / TENSORS)
    base: nn.Module = wrapped.get_base_model()
    return base


def _unfit(what: str, path: Path) -> FileFormatError:
    fix = "bring the folder back from a copy, or export it anew with `--to lora`"
    return FileFormatError(what, where=str(path), fix=fix)
