"""Settings of full fine-tuning. Imports no torch."""

from __future__ import annotations

from typing import Literal

from sparsegrad_cli.methods.base import MethodSettings, Sizing, TargetShapes


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

    @property
    def implemented_by(self) -> str:
        """``module:class`` of the implementation."""
        return "sparsegrad_cli.methods.full.method:Full"
