"""The methods: an explicit table. Imports no torch."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from sparsegrad_cli.methods.base import MethodSettings
from sparsegrad_cli.methods.full.settings import FullSettings
from sparsegrad_cli.methods.lora.settings import LoraSettings
from sparsegrad_cli.methods.meprop.settings import MepropSettings
from sparsegrad_cli.methods.neighbours.adaptive_settings import ADAPTIVE
from sparsegrad_cli.methods.neighbours.change_settings import CHANGES
from sparsegrad_cli.methods.neighbours.factor_settings import FACTORS
from sparsegrad_cli.methods.neighbours.gradient_settings import GRADIENTS
from sparsegrad_cli.methods.peft_types.settings import PeftSettings
from sparsegrad_cli.methods.peft_types.tuner_facts import ALIASES
from sparsegrad_cli.methods.sparsegrad.settings import SparsegradSettings

METHODS: dict[str, type[MethodSettings]] = {
    "full": FullSettings,
    "lora": LoraSettings,
    "meprop": MepropSettings,
    "peft": PeftSettings,
    "sparsegrad": SparsegradSettings,
    **CHANGES,
    **GRADIENTS,
    **ADAPTIVE,
    **FACTORS,
}
METHOD_NAMES = tuple(METHODS)
ALL_NAMES = (*METHOD_NAMES, *(name for name in ALIASES if name not in METHODS))
"""What a recipe or ``--methods`` may name: methods, PEFT types and variants of LoRA."""
SIZE_KEYS = frozenset().union(*(settings.sized_by for settings in METHODS.values()))
DEFAULT_METHOD = SparsegradSettings(name="sparsegrad", support="static")
BASELINE = "lora"  # a comparison measures differences against this method where it is a row

if TYPE_CHECKING:  # outside, settings are known by their contract alone
    MethodSection = MethodSettings
else:
    _any_of = functools.reduce(operator.or_, METHODS.values())
    MethodSection = Annotated[_any_of, Field(discriminator="name")]


def spelled_out(method: Any) -> Any:
    """Return a recipe's ``method``, not yet checked, without aliases.

    ``{name: dora, r: 4}`` is short for ``{name: peft, type: LORA, use_dora: true, r: 4}``. Anything
    else is returned as it is.
    """
    if isinstance(method, str):
        method = {"name": method}
    name = method.get("name") if isinstance(method, Mapping) else None
    if not isinstance(name, str) or name in METHODS or name.lower() not in ALIASES:
        return method
    own = {key: value for key, value in method.items() if key != "name"}
    return {"name": "peft", **ALIASES[name.lower()], **own}


def settings_class(method: Any) -> type[MethodSettings] | None:
    """Return the settings class of a recipe's ``method``, a name or a mapping not yet checked.

    Without a name it is that of the default method; None for an unknown one.
    """
    method = spelled_out(method)
    name = method.get("name", DEFAULT_METHOD.name) if isinstance(method, Mapping) else method
    return METHODS.get(name) if isinstance(name, str) else None
