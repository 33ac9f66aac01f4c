"""``sparsegrad calibrate``: a basis, and what it is worth."""

from __future__ import annotations

import time
from contextlib import nullcontext

from sparsegrad_cli.calibration.calibrate import Calibration, basis_keys
from sparsegrad_cli.calibration.diagnostics import Choice, KindGrams, energy_table
from sparsegrad_cli.interruption import deferred_interrupt
from sparsegrad_cli.methods.sparse_sizing import asked_entries
from sparsegrad_cli.methods.sparsegrad.core_plan import planned_supports
from sparsegrad_cli.models.targets import Target
from sparsegrad_cli.numerics.hosvd import Basis, is_whole, truncated
from sparsegrad_cli.recipe.method_section import SparsegradMethod
from sparsegrad_cli.records.run import CalibrationBlock
from sparsegrad_cli.tasks.setup import Setup, calibration_batches
from sparsegrad_cli.training.session import Session


class CalibrationSession(Session):
    """``sparsegrad calibrate``: the basis, and what it is worth on held-out gradients."""

    def run(self) -> None:
        """Do it all."""
        with self.explained():
            self._run()

    def _run(self) -> None:
        setup = self.load()
        with deferred_interrupt():
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
            # Its memory is not what calibration takes when a run is trained.
            self.gradient_phase = "energy"
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
                    choices=self._choices(setup, calibration),
                    train=self.recipe.train,
                    meter=lambda: self.meter.phase(self.gradient_phase),
                )
            self.seconds["diagnostics_s"] = time.perf_counter() - started
            made = self.record.record.calibration or CalibrationBlock()
            self.record.save(calibration=made.changed(energy=energy, heat_map=heat_map))
        self.record.save(time=dict(self.seconds), memory=self.meter.report())

    def _choices(self, setup: Setup, calibration: Calibration) -> dict[str, Choice]:
        """What would train of each target, beside its basis of full rank; empty for other methods.

        Calibration that keeps the leading directions alone knows no basis of full rank. It is then
        made from the same batches, for one target of each kind: all of them may not fit.
        """
        settings, targets = self.method, setup.targets
        if not isinstance(settings, SparsegradMethod):
            return {}
        own = calibration.by_target()
        full = {t.name: own[t.name] for t in targets if is_whole(own[t.name])}
        if len(full) < len(targets):
            kinds: dict[str, list[Target]] = {}
            for target in targets:
                kinds.setdefault(target.kind, []).append(target)
            few = [group[len(group) // 2] for group in kinds.values()]
            if self.recipe.calibration.basis_per == "kind":
                few = targets
            exact = {"decomposition": "exact", "score": "spectral"}
            size = self.calibration_batch
            found = self._calibrate(
                setup, size, self._own_steps, targets=few, changes=exact, whole=True
            )
            full = found.by_target()
        cut: dict[int, Basis] = {}
        for basis in own.values():
            cut.setdefault(id(basis), truncated(basis, self._rank))
        bases = {name: cut[id(basis)] for name, basis in own.items()}
        fixed = planned_supports(settings, targets, bases, calibration.scores)
        asked = asked_entries(settings, targets) if settings.support != "dense" else {}
        choices = {}
        for name, whole in full.items():
            room = bases[name].q_out.shape[1] * bases[name].q_in.shape[1]
            support = fixed.get(name)
            count = len(support) if support is not None else min(asked.get(name, room), room)
            choices[name] = Choice(bases[name], whole, count, support)
        return choices
