"""What a quantized model cannot do, known from the recipe alone. Imports no torch."""

from __future__ import annotations

from sparsegrad_cli.recipe.schema import Recipe
from sparsegrad_cli.recipe.yaml_source import KeyPath

INSTALL = "pip install 'bitsandbytes>=0.46.1'"


def quantization_problems(recipe: Recipe) -> list[tuple[KeyPath, str, str]]:
    """(key, what is wrong, what to do), all of them; none where nothing is quantized."""
    bits, method = recipe.model.quantization, recipe.method
    if bits is None:
        return []
    frozen = f"model.quantization {bits!r} freezes them"
    plain = "or leave model.quantization out"
    found: list[tuple[KeyPath, str, str]] = []
    refusal = method.quantization_refusal()
    if refusal is not None:
        key, what = refusal
        fix = f"use sparsegrad (form core) or lora, {plain}"
        found.append((("method", key), f"{what}, and {frozen}", fix))
    if method.calibrates:
        found += _of_calibration(recipe, bits)
    if recipe.scope == "rest":
        what = f"scope rest trains what lies between the targets, and {frozen}"
        found.append((("scope",), what, f"use scope head, {plain}"))
    if recipe.train.torch_compile:
        what = "torch_compile does not go with bitsandbytes' layers in training"
        found.append((("train", "torch_compile"), what, f"leave it out, {plain}"))
    return found


def _of_calibration(recipe: Recipe, bits: str) -> list[tuple[KeyPath, str, str]]:
    """Gradients of weights are what a quantized weight has none of; tokens need none."""
    settings = recipe.calibration
    if settings.source != "batch" or settings.basis is not None:
        return []
    what = f"source batch needs gradients of weights, which have none in {bits}"
    fix = "use source: token"
    if settings.decomposition == "sequential":
        fix += " with decomposition: randomized"
    return [(("calibration", "source"), what, fix)]
