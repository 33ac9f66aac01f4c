"""``sparsegrad calibrate``: a basis, and what it is worth."""

from __future__ import annotations

import time
from contextlib import nullcontext

from sparsegrad_cli.stopping import politely
from sparsegrad_cli.training.calibration import basis_keys
from sparsegrad_cli.training.diagnostics import KindGrams, energy_table
from sparsegrad_cli.training.session import Session
from sparsegrad_cli.training.setup import Setup, calibration_batches


class CalibrationSession(Session):
    """``sparsegrad calibrate``: the basis, and what it is worth on held-out gradients."""

    def run(self) -> None:
        """Do it all."""
        with self.explained():
            self._run()

    def _run(self) -> None:
        setup = self.load()
        with politely():
            self._measured(setup)

    def _measured(self, setup: Setup) -> None:
        settings = self.recipe.calibration
        kinds = KindGrams(setup.targets, basis_keys(setup.targets, settings.basis_per))
        asked = bool(settings.energy_steps)
        calibration = self.calibrated(
            setup, whole=asked, on_stream=kinds.add if asked else lambda key, stream: None
        )
        if settings.energy_steps:
            self.enter("energy", f"{settings.energy_steps} held-out steps")
            started = time.perf_counter()
            held_out = self.batches(
                calibration_batches(setup, self.calibration_batch, self.recipe.seed + 1),
                together=settings.energy_steps,
            )
            # At the head that the basis was made at; a kept one is warm already.
            with nullcontext() if settings.keep_head else self.warmed_head(setup):
                energy, heat_map = energy_table(
                    setup.model,
                    setup.targets,
                    calibration,
                    held_out,
                    steps=settings.energy_steps,
                    seed=self.recipe.seed + 1,
                    per_kind=kinds.bases(),
                    train=self.recipe.train,
                    meter=lambda: self.meter.phase("calibrate"),
                )
            self.seconds["diagnostics_s"] = time.perf_counter() - started
            self.record.data["calibration"].update(energy=energy, heat_map=heat_map)
        self.record.save(time=dict(self.seconds), memory=self.meter.report())
