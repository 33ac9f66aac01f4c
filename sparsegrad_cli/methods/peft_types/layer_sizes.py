"""Count the parameters of a PEFT type, by making its layers on the device meta."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.methods.peft_types.config import first_sentence, make_config

if TYPE_CHECKING:
    from sparsegrad_cli.methods.peft_types.settings import PeftSettings
    from sparsegrad_cli.models.targets import Target


def count(settings: PeftSettings, targets: Sequence[Target]) -> int:
    """Return the number of parameters that train in layers of the targets' shapes.

    Raises:
        UsageError: PEFT cannot make the layers, such as where a block size does not divide a side.
    """
    found = _count(_key(settings), settings.model_dump_json(), tuple(targets))
    if isinstance(found, str):
        raise UsageError(
            f"PEFT's {settings.type} does not fit these target modules: {found}",
            where="method.type",
            fix="choose other layers with targets.modules, or another type",
        )
    return found


def works(settings: PeftSettings, targets: Sequence[Target]) -> bool:
    """Return whether PEFT makes layers of the targets' shapes with these settings."""
    return isinstance(_count(_key(settings), settings.model_dump_json(), tuple(targets)), int)


def _key(settings: PeftSettings) -> str:
    return json.dumps([settings.type, settings.keys], sort_keys=True)


@functools.lru_cache(maxsize=4096)
def _count(key: str, plain: str, targets: tuple[Target, ...]) -> int | str:
    """Return the number, or why PEFT cannot make the layers."""
    from sparsegrad_cli.methods.peft_types.settings import PeftSettings

    settings = PeftSettings.model_validate_json(plain)
    if settings.type in _FORMULAS:
        sizes = [_FORMULAS[settings.type](_with_defaults(settings, targets), t) for t in targets]
        wrong = next((size for size in sizes if isinstance(size, str)), None)
        numbers = [size for size in sizes if isinstance(size, int)]
        return wrong or sum(numbers[:1] if settings.tuner.shared else numbers)
    from peft import get_peft_model

    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = make_config(settings, targets)
            if settings.reads_batches or getattr(config, "init_lora_weights", None) is not None:
                config.init_lora_weights = _plain_init(config.init_lora_weights)
            model = get_peft_model(stand_in(targets), config)
    except (TypeError, ValueError, NotImplementedError, AttributeError, RuntimeError) as error:
        return first_sentence(error)
    count: int = sum(p.numel() for p in model.parameters() if p.requires_grad)
    sampled = getattr(config, "monteclora_config", None)
    if (
        sampled is not None
    ):  # its sampler is not made on meta: a scale per rank, a weight per sample
        count += len(targets) * (config.r + sampled.num_samples)
    return count


def _plain_init(init: object) -> object:
    """Return an initialization with the same parameters that needs no weights."""
    return init if init == "mica" else True


# --- types whose layers PEFT cannot make on meta, because they read values


def _with_defaults(settings: PeftSettings, targets: Sequence[Target]) -> dict[str, Any]:
    """Return all keys of the type's configuration."""
    keys: dict[str, Any] = vars(make_config(settings, targets))
    return keys


def _adamss(keys: dict[str, Any], target: Target) -> int | str:
    """Return the count of ADAMSS, which clusters the rows of the weight.

    Every subspace holds A, (s, r), and its rows of B, (rows, s), with s = ``subspace_rank``. The
    rows of all subspaces add up to those of the layer.
    """
    narrow = min(target.in_features, target.out_features)
    spaces, rank = keys["num_subspaces"], keys["subspace_rank"]
    if spaces > target.out_features:
        return f"num_subspaces {spaces} exceeds the {target.out_features} rows"
    number: int = rank * (spaces * min(keys["r"], narrow) + target.out_features)
    return number


def _boft(keys: dict[str, Any], target: Target) -> int | str:
    """Return the count of BOFT: factors of blocks (b, b), and one scale per output."""
    side = keys["boft_block_size"] or target.in_features // keys["boft_block_num"]
    factors = keys["boft_n_butterfly_factor"]
    if target.in_features % (side * 2 ** (factors - 1)):
        return f"in_features ({target.in_features}) is not divisible by boft_block_size ({side})"
    number: int = factors * target.in_features * side + target.out_features
    return number


def _frod(keys: dict[str, Any], target: Target) -> int | str:
    """Return the count of FRoD: one scale per input, and a sparse part of (in, in)."""
    side = target.in_features
    return side + max(1, min(int(side * side * keys["sparse_rate"]), side * (side - 1)))


def _shira(keys: dict[str, Any], target: Target) -> int | str:
    """Return the count of SHiRA: that of LoRA of the same rank."""
    number: int = keys["r"] * (target.in_features + target.out_features)
    if number > target.size:
        return f"r {keys['r']} trains more parameters than the layer has"
    return number


def _unilora(keys: dict[str, Any], target: Target) -> int | str:
    """Return the length of the one vector that all layers share."""
    length: int = keys["theta_d_length"]
    return length


_FORMULAS: dict[str, Callable[[dict[str, Any], Target], int | str]] = {
    "ADAMSS": _adamss,
    "BOFT": _boft,
    "FROD": _frod,
    "SHIRA": _shira,
    "UNILORA": _unilora,
}


class _Module(nn.Module):
    """A module that only holds others."""

    def forward(self) -> None:
        """Compute nothing."""


def stand_in(targets: Iterable[Target]) -> nn.Module:
    """Return a model that holds layers of the targets' names and shapes, and nothing else."""
    model: nn.Module = _Module()
    for target in targets:
        *path, last = target.name.split(".")
        parent = model
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, _Module())
            parent = getattr(parent, part)
        made: nn.Module
        if target.transposed:
            made = Conv1D(target.out_features, target.in_features)
        else:
            made = nn.Linear(target.in_features, target.out_features)
        parent.add_module(last, made)
    return model
