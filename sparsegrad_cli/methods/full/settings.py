"""Settings of full fine-tuning. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from sparsegrad_cli.methods.base import MethodSettings, Sizing, TargetShapes

if TYPE_CHECKING:
    from sparsegrad_cli.methods.implementation import Method


class FullSettings(MethodSettings):
    """Full fine-tuning: every parameter of every target trains."""

    name: Literal["full"]

    @property
    def learning_rate_center(self) -> float:
        """Geometric mean, to one digit, of the rates that tuning chose.

        sst2 (twice) and cola 1e-4 each, OpenAssistant with SmolLM2-135M 8e-4.
        """
        return 2e-4

    def sizing(self, shapes: TargetShapes) -> Sizing:
        """Return all parameters of the targets."""
        return Sizing(shapes.parameters, "all parameters")

    def implementation(self) -> Method:
        """Return the implementation."""
        from sparsegrad_cli.methods.full.method import Full

        return Full(self)
