"""The table of methods: explicit, no plugins."""

from __future__ import annotations

from sparsegrad_cli.methods.base import Method
from sparsegrad_cli.methods.full.method import Full
from sparsegrad_cli.methods.lora.method import Lora
from sparsegrad_cli.methods.meprop.method import Meprop
from sparsegrad_cli.methods.sparsegrad.core import SparsegradCore
from sparsegrad_cli.methods.sparsegrad.rotated import Sparsegrad
from sparsegrad_cli.recipe.method_section import (
    FullMethod,
    LoraMethod,
    MepropMethod,
    SparsegradMethod,
)


def make_method(settings: FullMethod | LoraMethod | MepropMethod | SparsegradMethod) -> Method:
    """The method a recipe names."""
    if isinstance(settings, LoraMethod):
        return Lora(settings)
    if isinstance(settings, MepropMethod):
        return Meprop(settings)
    if isinstance(settings, SparsegradMethod):
        return SparsegradCore(settings) if settings.form == "core" else Sparsegrad(settings)
    return Full(settings)
