"""The adapter of a run: a PEFT folder where peft knows the method, else a file of ours.

adapter/adapter_config.json         of LoRA: peft's settings
adapter/adapter_model.safetensors   of LoRA: what training changed, and what the base model's files
                                    do not hold, by peft's names
adapter/adapter.safetensors         of other methods, and of LoRA in runs of version 0.1.0 and
                                    before: what training changed, by the method's names
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
from sparsegrad_cli.io.atomic import save_tensors, sync_tree
from sparsegrad_cli.io.paths import is_folder
from sparsegrad_cli.methods.implementation import Method
from sparsegrad_cli.methods.peft_folder import (
    CONFIG,
    modules_to_save,
    target_settings,
    to_peft,
)
from sparsegrad_cli.models.pretrained import base_name, locate
from sparsegrad_cli.recipe.schema import ModelSection
from sparsegrad_cli.restore.read_adapter import tied_names
from sparsegrad_cli.run.folder import ADAPTER, PEFT_ADAPTER
from sparsegrad_cli.tasks.setup import Setup


def drawn_parameters(method: Method, setup: Setup) -> dict[str, Tensor]:
    """Copies of the frozen parameters that the base model's files do not hold, on the CPU.

    Taken before training, for later they may be split over processes.
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
    """Write what a run has trained. Of processes that train together all have to ask.

    Args:
        run: the run's folder.
        drawn: as :func:`drawn_parameters` gives them.
        about: metadata of the file.

    Returns:
        The file with the tensors, which the first process has written.

    Raises:
        DiskError: it could not be written.
    """
    model = setup.model
    tensors = method.adapter_tensors(model)  # of all: what is split is gathered
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
            written.unlink(missing_ok=True)  # a link of that name would be written through
            written.write_text(text + "\n", encoding="utf-8")
            sync_tree(path.parent)
        except OSError as error:
            raise DiskError(
                f"{path.parent.name} could not be written: {error}",
                where=str(path.parent),
                fix="free some space",
            ) from error
        # Last: where it is, the folder is whole.
        save_tensors(path, to_peft(every), {**about, "format": "pt"})
    return run / PEFT_ADAPTER


def _peft_config(
    model: nn.Module, trained: Any, tensors: Iterable[str], targets: list[str], chat: bool
) -> Any:
    """peft's configuration for the folder: as in training, and whole modules for what lies beside.

    Biases of targets, and parameters whose module holds a target, are plain parameters in the file,
    which peft puts in their place.
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
