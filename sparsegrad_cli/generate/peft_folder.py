"""Load a PEFT adapter that may come from anyone, and check that PEFT uses all of it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from sparsegrad_cli.error_mapping import first_line
from sparsegrad_cli.errors import FileFormatError
from sparsegrad_cli.io.bounded_json import plain_json
from sparsegrad_cli.io.paths import is_file
from sparsegrad_cli.methods.peft_folder import CONFIG, TENSORS, of_adapter


def base_of(folder: Path) -> tuple[str, str | None]:
    """Return (name, revision) of the adapter's base model.

    Raises:
        FileFormatError: The configuration is damaged or needs another library's code, or the
            weights are not in safetensors.
    """
    path = folder / CONFIG
    try:
        config = plain_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise _unusable(f"is not an {CONFIG}: {error}", path) from error
    config = config if isinstance(config, dict) else {}
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(base, str) or not base.strip() or not isinstance(revision, str | None):
        raise _unusable("names no base model", path)
    if config.get("megatron_config") is not None:
        raise _unusable("needs modules of Megatron, which are not loaded here", path)
    if not is_file(folder / TENSORS):
        raise _unusable(
            f"peft cannot load it: there is no {TENSORS}, and no other format is read", folder
        )
    return base, revision


def load_onto(model: nn.Module, folder: Path) -> nn.Module:
    """Load the adapter with PEFT and return the model with the adapter in it.

    Raises:
        FileFormatError: PEFT cannot load it, would ignore a tensor, or lacks one.
    """
    from peft import PeftModel, get_peft_model_state_dict

    try:
        tensors = load_file(folder / TENSORS)
    except (OSError, SafetensorError, ValueError) as error:
        raise _unusable(f"cannot be read: {error}", folder / TENSORS) from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise _unusable(f"{name} holds values that are not finite", folder / TENSORS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT and transformers warn about each other.
            wrapped: Any = PeftModel.from_pretrained(model, str(folder))
            used = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    except Exception as error:  # The libraries raise many types for damaged files.
        raise _unusable(f"peft cannot load it: {first_line(error)}", folder) from error
    # PEFT ignores unknown names, and draws the values of missing ones.
    given, wanted = of_adapter(tensors), of_adapter(used)
    if given != wanted:
        name = min(given ^ wanted)
        what = f"{name} {'is missing' if name in wanted else 'does not belong'}"
        raise _unusable(f"the adapter does not fit its configuration: {what}", folder / TENSORS)
    base: nn.Module = wrapped.get_base_model()
    return base


def tokenizer_in(folder: Path) -> Any:
    """Return the tokenizer in the folder, or None if there is none.

    Raises:
        FileFormatError: It cannot be read.
    """
    if not (is_file(folder / "tokenizer_config.json") and is_file(folder / "tokenizer.json")):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # The libraries raise many types for damaged files.
        raise FileFormatError(
            f"the tokenizer cannot be read: {first_line(error)}",
            where=str(folder),
            fix="remove its files to use the base model's",
        ) from error


def _unusable(what: str, path: Path) -> FileFormatError:
    fix = "restore the folder from a copy, or export the run again with `--to lora`"
    return FileFormatError(what, where=str(path), fix=fix)
