"""Fine-tune a model in an open run folder: load, calibrate, prepare, train."""

from __future__ import annotations

from itertools import islice

from sparsegrad_cli.calibration.run_calibration import RunCalibration, basis_for_run
from sparsegrad_cli.interruption import deferred_interrupt, raise_if_requested
from sparsegrad_cli.memory.out_of_memory import out_of_memory_explained
from sparsegrad_cli.methods.implementation import (
    Method,
    Prepared,
    TrainingData,
    check_what_trains,
)
from sparsegrad_cli.models.precision import autocast_dtype
from sparsegrad_cli.models.targets import not_adapted_note
from sparsegrad_cli.numerics.seeding import temporary_seed
from sparsegrad_cli.recipe.trackers import tracker_environment
from sparsegrad_cli.records.run import MethodBlock
from sparsegrad_cli.restore.init_from import Initial
from sparsegrad_cli.run.open_run import Run
from sparsegrad_cli.tasks.precision import check_autocast
from sparsegrad_cli.tasks.setup import Setup, load
from sparsegrad_cli.training.loop import TrainingLoop
from sparsegrad_cli.training.memory_probe import training_trials
from sparsegrad_cli.training.schedule import StepPlan


def fine_tune(run: Run) -> None:
    """Train the model of a run, and leave its adapter, checkpoints and record in the folder.

    Raises:
        SparsegradError: of the kind that fits what happened.
    """
    recipe = run.recipe
    initial = Initial(run.loaded) if recipe.init_from is not None else None
    check_autocast(run.loaded)
    with tracker_environment(run.path, recipe.train):
        setup = load(run)
        with deferred_interrupt():
            method = setup.method_settings.implementation()
            prepared = _prepare(run, setup, method, initial)
            with out_of_memory_explained(recipe, "prepare", setup.model):
                loop = TrainingLoop(run, setup, method, prepared)
            trials = training_trials(setup, recipe.train, loop.loss, loop.optimizer, prepared.bases)
            with out_of_memory_explained(recipe, "train", setup.model, trials):
                loop.run()


def _prepare(run: Run, setup: Setup, method: Method, initial: Initial | None) -> Prepared:
    """Prepare the model for the method, and record what trains.

    The basis is a local variable here: afterwards, only what the method keeps of it is in memory.
    """
    basis = None
    if setup.method_settings.calibrates:
        basis = basis_for_run(run, setup, initial.basis if initial else lambda: None)
    raise_if_requested("preparing the model")
    with out_of_memory_explained(run.recipe, "prepare", setup.model):
        with temporary_seed(run.recipe.seed):  # PEFT draws A; the other methods draw nothing
            prepared = method.prepare(
                setup.model,
                setup.targets,
                scope=run.recipe.scope,
                bases=basis.by_target() if basis else None,
                scores=basis.scores if basis else None,
                training=_training_data(run, setup),
                autocast=autocast_dtype(run.recipe.train),
            )
        check_what_trains(setup.model, prepared.counts)
        if initial is not None:
            start = initial.load(setup, method)
            run.writer.save(init_from=start)
            head = f"; its head is {start.head}" if start.head else ""
            run.observer.note(f"training starts from {start.path}{head}")
    _record_method(run, setup, prepared)
    return prepared


def _training_data(run: Run, setup: Setup) -> TrainingData:
    """Return what the method may use of the run. Every process reads the same batches."""
    recipe = run.recipe
    calibration = RunCalibration(run, setup)
    if recipe.method.reads_batches:
        calibration.choose_rows()  # Before the method changes the model.
    return TrainingData(
        steps=StepPlan.of(recipe.train, len(setup.train_data)).max_steps,
        batches=lambda: islice(calibration.batches(), recipe.calibration.steps),
        loss=lambda batch: setup.objective.loss(setup.model, batch),
    )


def _record_method(run: Run, setup: Setup, prepared: Prepared) -> None:
    settings = run.recipe.method.model_dump()
    counts = prepared.counts.record()
    note = not_adapted_note(setup.not_adapted, run.recipe.scope)
    run.writer.save(
        method=MethodBlock(
            name=settings.pop("name"),
            form=settings.get("form"),
            support=settings.get("support"),
            density=settings.get("density"),
            scope=run.recipe.scope,
            settings=settings,
        ),
        counts=counts.changed(note="; ".join(part for part in (counts.note, note) if part)),
    )
