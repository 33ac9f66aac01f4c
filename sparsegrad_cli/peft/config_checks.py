"""Checks of a configuration, which keyword arguments or an edited JSON file may hold."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsegrad_cli.peft.config import SparseGradConfig

SUPPORTS = ("static", "dense", "dynamic", "refresh")
WANTED_BASIS = (
    "expected what sparsegrad_cli.calibrate(model, batches) returns, or "
    "sparsegrad_cli.load_basis(path)"
)


def problems(config: SparseGradConfig) -> Iterator[str]:
    """Yield what is wrong with a configuration; values are only compared if their types fit."""
    wrong_types = list(_wrong_types(config))
    yield from wrong_types
    if not wrong_types:
        yield from _out_of_range(config)
        yield from _without_effect(config)
        yield from _wrong_layers(config)


def _wrong_types(config: SparseGradConfig) -> Iterator[str]:
    if config.basis is not None and not callable(getattr(config.basis, "by_target", None)):
        yield f"basis is of type {type(config.basis).__name__}: {WANTED_BASIS}"
    for name in ("target_modules", "exclude_modules"):
        yield from _wrong_modules(name, getattr(config, name))
    for name in ("rank", "refresh_steps"):
        value = getattr(config, name)
        if value is not None and not _is_whole(value):
            yield f"{name} is {value!r}: expected a whole number of at least 1"
    for name in ("density", "state_capacity"):
        value = getattr(config, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            yield f"{name} is {value!r}: expected a number"
    for name in ("layers", "shared_bases"):
        if not isinstance(getattr(config, name), Mapping):
            yield f"{name} is {getattr(config, name)!r}: expected a mapping of module names"


def _wrong_modules(name: str, value: Any) -> Iterator[str]:
    if value == "all-linear":
        yield (
            f"{name} is 'all-linear', which is not supported: leave it out to adapt all modules "
            "that the basis covers; calibrate(target_modules=...) chooses those"
        )
    elif isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            yield f"{name} is {value!r}: expected a regular expression or a list of names: {error}"
    elif value is not None and not (
        isinstance(value, list | tuple | set) and all(isinstance(each, str) for each in value)
    ):
        yield f"{name} is {value!r}: expected a list of names or a regular expression"


def _out_of_range(config: SparseGradConfig) -> Iterator[str]:
    if config.support not in SUPPORTS:
        yield f"support is {config.support!r}: expected one of {', '.join(SUPPORTS)}"
    if config.density is not None and not 0 < config.density <= 1:
        yield f"density is {config.density}: expected a number above 0 and up to 1"
    if config.allocation not in ("target", "model"):
        yield f"allocation is {config.allocation!r}: expected 'target' or 'model'"
    for name in ("rank", "refresh_steps", "state_capacity"):
        value = getattr(config, name)
        if value is not None and not value >= 1:
            yield f"{name} is {value}: expected at least 1"


def _without_effect(config: SparseGradConfig) -> Iterator[str]:
    if config.allocation == "model" and config.support != "static":
        yield "allocation='model' needs support='static'"
    if config.refresh_steps is not None and config.support != "refresh":
        yield "refresh_steps needs support='refresh'"
    if config.state_capacity is not None and config.support != "dynamic":
        yield "state_capacity needs support='dynamic'"
    # Earlier versions saved a density in every configuration.
    given = config.density is not None and config.rank is not None and not config.layers
    if config.support == "dense" and given:
        yield "support='dense' trains the whole core: give rank or density, not both"


def _wrong_layers(config: SparseGradConfig) -> Iterator[str]:
    """Yield saved sizes that contradict each other."""
    for name, sizes in config.layers.items():
        if not isinstance(sizes, list | tuple) or len(sizes) != 3 or not all(map(_is_size, sizes)):
            yield f"layers: {name} is {sizes!r}: expected [r_out, r_in, trained parameters]"
            return
        rows, columns, count = sizes
        if count > rows * columns or (config.support == "dense" and count != rows * columns):
            yield (
                f"layers: {name} trains {count} parameters of a core of {rows} x {columns}, which "
                f"does not fit support {config.support!r}: restore the saved adapter_config.json"
            )
            return
    for name, first in config.shared_bases.items():
        unknown = next((each for each in (name, first) if each not in config.layers), None)
        if unknown is not None or first in config.shared_bases:
            why = f"layers has no {unknown!r}" if unknown is not None else f"{first} has none"
            yield (
                f"shared_bases: {name} takes the bases of {first!r}, but {why}: restore the saved "
                "adapter_config.json"
            )
            return
        if list(config.layers[name][:2]) != list(config.layers[first][:2]):
            yield f"shared_bases: {name} and {first} share bases, but their cores differ in layers"
            return


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_size(value: Any) -> bool:
    return _is_whole(value) and value >= 1
