"""Read the adapter of a run; training/adapter_folder.py writes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor, nn

from sparsegrad_cli.io.atomic import read_tensors
from sparsegrad_cli.methods.peft_folder import from_peft
from sparsegrad_cli.run.folder import PEFT_ADAPTER


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
