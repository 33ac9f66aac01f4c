"""Make and check the configuration of a PEFT type. Imports peft."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, get_type_hints

from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from pydantic import TypeAdapter, ValidationError

from sparsegrad_cli.io.suggest import listed
from sparsegrad_cli.methods.peft_types.tuner_facts import SHIRA_MASKS
from sparsegrad_cli.recipe.yaml_source import shorten

if TYPE_CHECKING:
    from sparsegrad_cli.methods.peft_types.settings import PeftSettings
    from sparsegrad_cli.models.targets import Target


def config_class(name: str) -> Any:
    """Return PEFT's configuration class of a type."""
    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name)]


def fields_of(name: str) -> tuple[str, ...]:
    """Return the keys of a type's configuration."""
    return tuple(field.name for field in dataclasses.fields(config_class(name)))


@functools.cache
def _adapter(name: str, key: str) -> TypeAdapter[Any] | None:
    try:
        return TypeAdapter(get_type_hints(config_class(name))[key])
    except Exception:  # pydantic has no schema for a type of PEFT: the value is not checked
        return None


def type_problem(name: str, key: str, value: Any) -> str | None:
    """Return what is wrong with the type of a value; None if the configuration takes it."""
    if (name, key) == ("SHIRA", "mask_type"):
        return None if value in SHIRA_MASKS else f"expected {listed(SHIRA_MASKS)}, got {value!r}"
    adapter = _adapter(name, key)
    if adapter is None:
        return None
    # PEFT 0.21 takes these values, and its annotation leaves them out.
    if isinstance(value, str) and (value == "lora_ga" or value.startswith("pissa_niter_")):
        return None
    try:
        adapter.validate_python(value, strict=not isinstance(value, dict))
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
        return f"{shorten(value)} is not a value that PEFT takes: {found['msg']}"
    return None


def problem_of(settings: PeftSettings) -> str | None:
    """Return why PEFT refuses the settings, whatever the layers; None if it does not."""
    try:
        make_config(settings, (), steps=1_000_000)
    except (ValueError, TypeError, KeyError, ImportError) as error:
        return first_sentence(error)
    return None


def first_sentence(error: BaseException) -> str:
    """Return the beginning of PEFT's message."""
    return str(error).strip().partition("\n")[0][:300]


def make_config(
    settings: PeftSettings, targets: Sequence[Target], *, steps: int | None = None
) -> PeftConfig:
    """Return PEFT's configuration for these targets.

    Args:
        settings: of the method, at a size.
        targets: the target modules, which PEFT adapts by their full names.
        steps: optimizer steps of the run, for types that plan with them.
    """
    keys = {**settings.tuner.defaults, **settings.keys}
    known = fields_of(settings.type)
    if settings.type == "LORA":
        _fill_in_lora(keys)
    if settings.type == "ADALORA":
        keys |= {"total_step": steps or 1_000_000}
        init = keys.setdefault("init_r", 12)
        keys.setdefault("target_r", max(1, 2 * init // 3))  # PEFT's own are 12 and 8
    if settings.tuner.fits is not None and settings.tuner.fits not in keys and targets:
        key = settings.tuner.fits
        keys[key] = _fitting(config_class(settings.type).__dataclass_fields__[key].default, targets)
    if "fan_in_fan_out" in known:
        keys["fan_in_fan_out"] = any(target.transposed for target in targets)
    for key, value in keys.items():
        adapter = _adapter(settings.type, key)
        if isinstance(value, dict) and adapter is not None:
            keys[key] = adapter.validate_python(value)
    keys["target_modules"] = [target.name for target in targets] or ["placeholder"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as: mask_type needs a mask_fn, which follows
        return config_class(settings.type)(**keys)


def _fill_in_lora(keys: dict[str, Any]) -> None:
    """Fill in alpha as method lora does, and the settings that an initialization needs."""
    keys.setdefault("lora_alpha", 2 * keys.get("r", 8))
    from peft.tuners.lora.config import CordaConfig, EvaConfig, LoraGAConfig

    # EVA would give every layer another rank (rho), and a restored model could not know them.
    made = {"eva": EvaConfig(rho=1.0), "corda": CordaConfig(), "lora_ga": LoraGAConfig()}
    init = keys.get("init_lora_weights")
    if init in made:
        keys.setdefault(f"{init}_config", made[init])
    if "monteclora_config" in keys:
        # One sample at a time, drawn in the step that uses it: a resumed run draws the same.
        keys["monteclora_config"] = {**keys["monteclora_config"], "buffer_size": 1}


def _fitting(default: int, targets: Sequence[Target]) -> int:
    """Return the largest divisor of all sides that is at most PEFT's default."""
    common = math.gcd(*(side for t in targets for side in (t.out_features, t.in_features)))
    return max(divisor for divisor in range(1, default + 1) if common % divisor == 0)
