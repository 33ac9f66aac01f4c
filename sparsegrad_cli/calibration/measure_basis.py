"""Compute a run's basis and measure its quality on held-out gradients."""

from __future__ import annotations

import time
from contextlib import nullcontext

from sparsegrad_cli.calibration.calibrate import Calibration
from sparsegrad_cli.calibration.diagnostics import Choice, KindGrams, energy_table
from sparsegrad_cli.calibration.run_calibration import RunCalibration
from sparsegrad_cli.interruption import deferred_interrupt
from sparsegrad_cli.models.targets import Target, basis_keys
from sparsegrad_cli.numerics.hosvd import is_whole, map_bases, truncated
from sparsegrad_cli.records.run import CalibrationBlock
from sparsegrad_cli.run.open_run import Run
from sparsegrad_cli.tasks.setup import load


def make_and_measure_basis(run: Run) -> None:
    """Load model and data, compute the basis, and measure the energy of held-out gradients."""
    setup = load(run)
    with deferred_interrupt():
        calibration = RunCalibration(run, setup)
        measured = bool(run.recipe.calibration.energy_steps)
        kinds = KindGrams(
            setup.targets, basis_keys(setup.targets, run.recipe.calibration.basis_per)
        )
        made = calibration.make_basis(
            whole=measured, on_stream=kinds.add if measured else lambda key, stream: None
        )
        if measured:
            _measure_energy(calibration, made, kinds)
        run.writer.save(time=dict(run.seconds), memory=setup.meter.report())


def _measure_energy(calibration: RunCalibration, made: Calibration, kinds: KindGrams) -> None:
    """Measure and record ``energy`` and ``heat_map`` of the ``calibration`` block."""
    run, setup = calibration.run, calibration.setup
    settings, seed = run.recipe.calibration, run.recipe.seed + 1
    # Energy is a memory phase of its own, because training does not measure energy.
    run.begin_phase("energy", f"{settings.energy_steps} held-out steps")
    started = time.perf_counter()
    held_out = calibration.counted(calibration.random_batches(seed), together=settings.energy_steps)
    # Use the head that the basis was computed with. A kept head is warm already.
    warm = nullcontext() if settings.keep_head else calibration.warmed_head("energy")
    with calibration.memory_explained("energy"), warm:
        run.observer.total_steps("energy", settings.energy_steps)
        energy, heat_map = energy_table(
            setup.model,
            setup.targets,
            made,
            held_out,
            steps=settings.energy_steps,
            seed=seed,
            per_kind=kinds.bases(),
            choices=_choices(calibration, made),
            train=run.recipe.train,
            meter=lambda: setup.meter.phase("energy"),
            on_step=lambda n, loss: run.observer.step("energy", {"step": n, "loss": loss}),
        )
    run.seconds["diagnostics_s"] = time.perf_counter() - started
    block = run.writer.record.calibration or CalibrationBlock()
    run.writer.save(calibration=block.changed(energy=energy, heat_map=heat_map))


def _choices(calibration: RunCalibration, made: Calibration) -> dict[str, Choice]:
    """Return the parameters of each target that would train, with the target's full-rank basis.

    Calibration that keeps only the leading directions has no full-rank bases. They are then
    computed from the same batches for one target of each kind, because all of them may not fit in
    memory.
    """
    setup = calibration.setup
    settings, targets = setup.method_settings, setup.targets
    own = made.by_target()
    full = {t.name: own[t.name] for t in targets if is_whole(own[t.name])}
    if len(full) < len(targets):
        full = calibration.calibrate(
            calibration.own_steps,
            targets=_to_decompose(calibration),
            changes={"decomposition": "exact", "score": "spectral"},
            whole=True,
        ).by_target()
    bases = map_bases(own, lambda name, basis: truncated(basis, settings.basis_rank))
    plans = settings.implementation().planned(targets, bases, made.scores)
    return {
        name: Choice(bases[name], whole, plans[name].count, plans[name].positions)
        for name, whole in full.items()
    }


def _to_decompose(calibration: RunCalibration) -> list[Target]:
    """Return the targets whose full-rank basis is computed for comparison."""
    targets = calibration.setup.targets
    if calibration.run.recipe.calibration.basis_per == "kind":
        return targets
    kinds: dict[str, list[Target]] = {}
    for target in targets:
        kinds.setdefault(target.kind, []).append(target)
    return [group[len(group) // 2] for group in kinds.values()]
