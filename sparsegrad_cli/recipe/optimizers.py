"""The optimizers that ``train.optim`` may name, by their names in TrainingArguments. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sparsegrad_cli.io.suggest import did_you_mean

INSTALL_BITSANDBYTES = "pip install 'bitsandbytes>=0.46.1'"
DEFAULT_OPTIMIZER = "adamw_torch"


@dataclass(frozen=True)
class OptimizerFacts:
    """What a recipe may set for an optimizer.

    Attributes:
        reads: keys of ``train:`` that it uses, beside the learning rate and weight decay.
        arguments: arguments that ``optim_args`` may give, and their types.
        bits: bits of its state, for those of bitsandbytes; None for the others.
    """

    reads: frozenset[str] = frozenset()
    arguments: Mapping[str, type] = field(default_factory=dict)
    bits: int | None = None

    @property
    def of_bitsandbytes(self) -> bool:
        """Whether bitsandbytes provides it."""
        return self.bits is not None


_BETAS = frozenset({"adam_beta1", "adam_beta2"})
_ADAM = _BETAS | {"adam_epsilon"}
OPTIMIZERS: dict[str, OptimizerFacts] = {
    "adamw_torch": OptimizerFacts(_ADAM),
    "adamw_torch_fused": OptimizerFacts(_ADAM),
    "adafactor": OptimizerFacts(),
    "sgd": OptimizerFacts(arguments={"momentum": float, "dampening": float, "nesterov": bool}),
    "adagrad": OptimizerFacts(arguments={"lr_decay": float, "eps": float}),
    "rmsprop": OptimizerFacts(
        arguments={"momentum": float, "alpha": float, "eps": float, "centered": bool}
    ),
    "adamw_8bit": OptimizerFacts(_ADAM, bits=8),
    "adamw_bnb_8bit": OptimizerFacts(_ADAM, bits=8),
    "paged_adamw_8bit": OptimizerFacts(_ADAM, bits=8),
    "paged_adamw_32bit": OptimizerFacts(_ADAM, bits=32),
    "lion_8bit": OptimizerFacts(_BETAS, bits=8),
    "lion_32bit": OptimizerFacts(_BETAS, bits=32),
    "paged_lion_8bit": OptimizerFacts(_BETAS, bits=8),
    "paged_lion_32bit": OptimizerFacts(_BETAS, bits=32),
}
# Names of TrainingArguments that need a package which we do not support, and that package.
_PACKAGES = {
    "adamw_torch_xla": "torch_xla",
    "adamw_torch_npu_fused": "torch_npu",
    "adamw_anyprecision": "torchdistx",
    "adamw_torch_4bit": "torchao",
    "adamw_torch_8bit": "torchao",
    "lomo": "lomo-optim",
    "adalomo": "lomo-optim",
    "grokadamw": "grokadamw",
    "schedule_free_radam": "schedulefree",
    "schedule_free_adamw": "schedulefree",
    "schedule_free_sgd": "schedulefree",
    "apollo_adamw": "apollo-torch",
    "apollo_adamw_layerwise": "apollo-torch",
    "stable_adamw": "torch-optimi",
}


def check_optimizer_name(name: Any) -> None:
    """Check a value of ``train.optim``.

    Raises:
        ValueError: It is not an optimizer that a run can use; names the package or a near name.
    """
    if name in OPTIMIZERS:
        return
    if not isinstance(name, str):
        given = "null" if name is None else f"{name!r:.60}"
        raise ValueError(f"expected the name of an optimizer, got {given}")
    if name in _PACKAGES:
        raise ValueError(
            f"{name} needs the package {_PACKAGES[name]}, which sparsegrad does not support: "
            f"expected one of {', '.join(OPTIMIZERS)}"
        )
    if name.startswith("galore_"):
        raise ValueError(
            f"{name} needs the package galore-torch, whose state a checkpoint cannot hold: use "
            "method galore with optim adamw_torch"
        )
    usual = [each for each, facts in OPTIMIZERS.items() if not facts.of_bitsandbytes]
    hint = did_you_mean(name, list(OPTIMIZERS)) or f"expected {', '.join(usual)} and others"
    raise ValueError(f"{name!r:.60} is not an optimizer: {hint}")


def parse_arguments(optimizer: str, text: str) -> dict[str, float | bool]:
    """Return the arguments in ``optim_args``, written as in TrainingArguments: ``momentum=0.9``.

    Args:
        optimizer: Name of the optimizer.
        text: Arguments with their values, separated by commas.

    Raises:
        ValueError: The optimizer has no such argument, or a value has another type.
    """
    known = OPTIMIZERS[optimizer].arguments
    if not known:
        takers = [name for name, facts in OPTIMIZERS.items() if facts.arguments]
        raise ValueError(f"{optimizer} takes no arguments here; {', '.join(takers)} do")
    found: dict[str, float | bool] = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name not in known:
            raise ValueError(f"{optimizer} takes {', '.join(known)}, got {part.strip()!r:.60}")
        if name in found:
            raise ValueError(f"{name} is there twice")
        found[name] = _boolean(name, value) if known[name] is bool else _number(name, value)
    if found.get("nesterov") and (not found.get("momentum") or found.get("dampening")):
        raise ValueError("nesterov needs a momentum and dampening 0: momentum=0.9,nesterov=true")
    return found


def _boolean(name: str, value: str) -> bool:
    if value.lower() not in ("true", "false"):
        raise ValueError(f"{name}: expected true or false, got {value!r:.60}")
    return value.lower() == "true"


def _number(name: str, value: str) -> float:
    """Return a share from 0 to below 1; of ``eps`` a number above 0, of ``lr_decay`` from 0."""
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    fits, expected = {
        "eps": (0 < number < math.inf, "a number above 0"),
        "lr_decay": (0 <= number < math.inf, "a number of at least 0"),
    }.get(name, (0 <= number < 1, "a number from 0 to below 1"))
    if not fits:
        raise ValueError(f"{name}: expected {expected}, got {value!r:.60}")
    return number
