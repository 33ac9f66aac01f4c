"""The adapter of a run: a PEFT folder if PEFT knows the method, otherwise a file of ours.

adapter/adapter_config.json         LoRA: PEFT's settings
adapter/adapter_model.safetensors   LoRA: what training changed, and what the base model's files
                                    do not hold, by PEFT's names
adapter/adapter.safetensors         other methods, and LoRA in runs of version 0.1.0: what training
                                    changed, by the method's names
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparsegrad_cli import distributed
from sparsegrad_cli.errors import DiskError
from sparsegrad_cli.io.atomic import read_tensors, save_tensors, sync_tree
from sparsegrad_cli.io.paths import is_folder
from sparsegrad_cli.methods.implementation import Method
from sparsegrad_cli.methods.peft_folder import (
    CONFIG,
    from_peft,
    modules_to_save,
    target_settings,
    to_peft,
)
from sparsegrad_cli.models.pretrained import base_name, locate
from sparsegrad_cli.recipe.schema import ModelSection
from sparsegrad_cli.run.folder import ADAPTER, PEFT_ADAPTER
from sparsegrad_cli.tasks.setup import Setup


def drawn_parameters(method: Method, setup: Setup) -> dict[str, Tensor]:
    """Return CPU copies of the frozen parameters that the base model's files do not hold.

    Call it before training, since weights may be sharded afterwards.
    """
    if method.peft_config is None or setup.head is None:
        return {}
    every = dict(setup.model.named_parameters())
    fresh = {name: every[name] for name in setup.head.fresh if name in every}
    return {n: p.detach().cpu().clone() for n, p in fresh.items() if not p.requires_grad}


def save_adapter(
    run: Path,
    method: Method,
    setup: Setup,
    section: ModelSection,
    drawn: Mapping[str, Tensor],
    about: Mapping[str, str],
) -> Path:
    """Write what a run has trained. All processes have to call it.

    Args:
        run: The run's folder.
        method: Has trained the model.
        setup: Holds the model.
        section: The recipe's model.
        drawn: From :func:`drawn_parameters`.
        about: Metadata of the file.

    Returns:
        The file of tensors, which the first process has written.

    Raises:
        DiskError: It cannot be written.
    """
    model = setup.model
    tensors = method.adapter_tensors(model)  # In all processes: sharded tensors are gathered.
    if method.peft_config is None:
        if distributed.is_rank_zero():
            save_tensors(run / ADAPTER, tensors, dict(about))
        return run / ADAPTER
    if distributed.is_rank_zero():
        path = run / PEFT_ADAPTER
        every = {**tensors, **drawn, **tied_names(model, tensors)}
        names = [target.name for target in setup.targets]
        config = _peft_config(model, method.peft_config, every, names, setup.task.kind == "chat")
        source = locate(base_name(section))
        config.base_model_name_or_path = source
        config.revision = None if is_folder(source) else section.revision
        text = json.dumps(config.to_dict(), default=sorted, indent=2, sort_keys=True)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            written = path.parent / CONFIG
            written.unlink(missing_ok=True)  # A link would be written through.
            written.write_text(text + "\n", encoding="utf-8")
            sync_tree(path.parent)
        except OSError as error:
            raise DiskError(
                f"{path.parent.name} could not be written: {error}",
                where=str(path.parent),
                fix="free some space",
            ) from error
        # Written last: if it is there, the folder is whole.
        save_tensors(path, to_peft(every), {**about, "format": "pt"})
    return run / PEFT_ADAPTER


def _peft_config(
    model: nn.Module, trained: Any, tensors: Iterable[str], targets: list[str], chat: bool
) -> Any:
    """Return PEFT's configuration for the folder, with the modules that are saved whole.

    Biases of target modules, and parameters of modules that hold a target module, are plain
    parameters in the file; PEFT loads them into place.
    """
    config = copy.deepcopy(trained)
    inside = tuple(f"{name}." for name in targets)
    others = [name for name in tensors if not name.startswith(inside)]
    modules, _ = modules_to_save(model, others, targets, classifier=not chat)
    settings = target_settings(model, targets, trained.lora_dropout)
    for name, value in settings.items():
        setattr(config, name, value)
    config.task_type = "CAUSAL_LM" if chat else "SEQ_CLS"
    config.modules_to_save = modules or None
    biases = any(n.startswith(inside) and n.endswith("base_layer.bias") for n in tensors)
    config.bias = "all" if biases else "none"
    config.inference_mode = True
    return config


def read_adapter(path: Path, model: nn.Module, fresh: Iterable[str]) -> dict[str, Tensor]:
    """Return the tensors of an adapter by the method's names, as ``load_adapter`` expects them.

    Args:
        path: See :func:`sparsegrad_cli.run.folder.adapter_file`.
        model: A model prepared by the method. Parameters that its base model's files lack are set.
        fresh: The recorded names of those parameters.

    Raises:
        FileFormatError: The file is missing or damaged.
    """
    tensors = read_tensors(path)
    if path.name != PEFT_ADAPTER.name:
        return tensors
    tensors = from_peft(tensors)
    for name in tied_names(model, tensors):
        del tensors[name]
    every = dict(model.named_parameters())
    for name in fresh:
        parameter = every.get(name)
        if parameter is None or parameter.requires_grad or name not in tensors:
            continue
        if parameter.shape == tensors[name].shape:
            parameter.data.copy_(tensors.pop(name))
    return tensors


def tied_names(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the other names of tied parameters, each with a copy of the tensor."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        name: tensors[first[id(parameter)]].detach().clone()
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name != first[id(parameter)] and first[id(parameter)] in tensors
    }
