"""One calibration or training run, step by step, filling its record as it goes."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import torch

from sparsegrad_cli.data.collate import longest_batch
from sparsegrad_cli.errors import InterruptedRunError
from sparsegrad_cli.measure.memory import make_meter
from sparsegrad_cli.methods.base import Method, Prepared
from sparsegrad_cli.methods.table import make_method
from sparsegrad_cli.numerics.hosvd import Basis
from sparsegrad_cli.observer import Observer
from sparsegrad_cli.recipe.loading import LoadedRecipe, digest
from sparsegrad_cli.rundir import RunRecord
from sparsegrad_cli.training import checkpoint as files
from sparsegrad_cli.training.arguments import training_arguments
from sparsegrad_cli.training.basis_file import (
    BasisFile,
    check_belongs,
    read_basis,
    tensors_digest,
    write_basis,
)
from sparsegrad_cli.training.calibration import Calibration, calibrate, forked_random
from sparsegrad_cli.training.callbacks import (
    InterruptCallback,
    ProbeCallback,
    RecordCallback,
    graceful_interrupt,
)
from sparsegrad_cli.training.diagnostics import energy_table, spectra
from sparsegrad_cli.training.setup import Setup, calibration_batches, make_setup, to_device
from sparsegrad_cli.training.trainer import SparsegradTrainer

BASIS_NAME = "basis.safetensors"


class Session:
    """What calibration and training have in common."""

    def __init__(self, loaded: LoadedRecipe, record: RunRecord, observer: Observer) -> None:
        self.loaded, self.recipe = loaded, loaded.recipe
        self.record, self.observer = record, observer
        self.seconds: dict[str, float] = {}

    def load(self) -> Setup:
        """Model, data and targets; fills model, task, hashes and memory's load phase."""
        self.observer.phase("load", self.recipe.model.name)
        started = time.perf_counter()
        setup = make_setup(self.loaded, self.observer)
        self.seconds["load_s"] = time.perf_counter() - started
        self.meter = make_meter(setup.device)
        self.meter.watch(setup.model)
        with self.meter.phase("load"):
            pass
        config: Any = setup.model.config
        spec = setup.task.spec
        self.record.save(
            model={
                "name": self.recipe.model.name,
                "architecture": type(setup.model).__name__,
                "model_type": getattr(config, "model_type", None),
                "parameters": sum(p.numel() for p in setup.model.parameters()),
                "dtype": self.recipe.model.dtype,
                "fingerprint": setup.fingerprint,
            },
            task={
                "name": spec.name,
                "metric": spec.metric,
                "regression": spec.regression,
                "label_names": list(spec.label_names) if spec.label_names else None,
                "train_examples": len(setup.train_data),
                "validation_examples": {k: len(v) for k, v in setup.validation.items()},
                "majority_score": setup.task.majority.get(spec.metric),
                "majority_accuracy": setup.task.majority.get("accuracy"),
                "max_length": self.recipe.task.max_length,
                "padding": self.recipe.task.padding,
                "notes": list(setup.task.notes),
            },
            hashes={"data": setup.task.data_hash, "head_init": setup.head_hash, "order": {}},
        )
        return setup

    def calibrated(self, setup: Setup) -> Calibration:
        """Stream gradients and make bases; fills the calibration block, writes the basis file."""
        settings = self.recipe.calibration
        batch_size = settings.batch_size or self.recipe.train.per_device_train_batch_size
        self.observer.phase("calibrate", f"{settings.steps} steps, no update")
        self.observer.total_steps("calibrate", settings.steps)
        calibration = calibrate(
            setup.model,
            setup.targets,
            calibration_batches(setup, batch_size, self.recipe.seed),
            steps=settings.steps,
            basis_per=settings.basis_per,
            seed=self.recipe.seed,
            meter=lambda: self.meter.phase("calibrate"),
            on_step=lambda n, loss: self.observer.step("calibrate", {"step": n, "loss": loss}),
        )
        self.seconds["calibrate_s"] = calibration.seconds
        made_with: dict[str, Any] = {
            "steps": settings.steps,
            "batch_size": batch_size,
            "basis_per": settings.basis_per,
            "source": "batch",
            "seed": self.recipe.seed,
        }
        peak = self.meter.report()["phases"].get("calibrate", {}).get("peak_bytes")
        made_with |= {"seconds": calibration.seconds, "peak_bytes": peak}
        file = BasisFile(
            calibration.bases,
            calibration.keys,
            self.recipe.model.name,
            setup.fingerprint,
            made_with,
            digest(self.recipe),
            tensors_digest(calibration.bases),
        )
        path = self.record.path / BASIS_NAME
        write_basis(path, file)
        self.record.save(
            calibration={
                **made_with,
                "stream_bytes": calibration.stream_bytes,
                "basis_file": BASIS_NAME,
                "basis_bytes": sum(b.nbytes() for b in calibration.bases.values()),
                "reused": False,
                "digest": file.digest,
                "spectra": spectra(_one_per_kind(calibration.bases, setup)),
            }
        )
        return calibration


def _one_per_kind(bases: dict[str, Basis], setup: Setup) -> dict[str, Basis]:
    """The bases to plot: all when shared by kind, else those of the middle block."""
    if len(bases) <= 4:
        return bases
    middle = setup.targets[len(setup.targets) // 2].block
    names = {t.name for t in setup.targets if t.block == middle}
    return {key: basis for key, basis in bases.items() if key in names}


class CalibrationSession(Session):
    """``sparsegrad calibrate``: the basis, and what it is worth on held-out gradients."""

    def run(self) -> None:
        """Do it all."""
        setup = self.load()
        calibration = self.calibrated(setup)
        settings = self.recipe.calibration
        if settings.energy_steps:
            self.observer.phase("energy", f"{settings.energy_steps} held-out steps")
            started = time.perf_counter()
            batch_size = settings.batch_size or self.recipe.train.per_device_train_batch_size
            held_out = calibration_batches(setup, batch_size, self.recipe.seed + 1)
            energy, heat_map = energy_table(
                setup.model,
                setup.targets,
                calibration,
                held_out,
                steps=settings.energy_steps,
                seed=self.recipe.seed + 1,
            )
            self.seconds["diagnostics_s"] = time.perf_counter() - started
            self.record.data["calibration"].update(energy=energy, heat_map=heat_map)
        self.record.save(time=dict(self.seconds), memory=self.meter.report())


class TrainingSession(Session):
    """``sparsegrad train``: from recipe to record, adapter and checkpoints."""

    def __init__(
        self, loaded: LoadedRecipe, record: RunRecord, observer: Observer, *, resume: bool
    ) -> None:
        super().__init__(loaded, record, observer)
        self.resume = resume
        self.batch_shape: list[int] | None = None

    def run(self) -> None:
        """Do it all."""
        with graceful_interrupt() as asked:
            setup = self.load()
            method = make_method(self.recipe.method)
            bases = self._bases(setup) if method.needs_basis else None
            if asked.is_set():
                raise InterruptedRunError("stopped before training began", fix="--resume starts it")
            with forked_random(self.recipe.seed):  # peft draws A; the others draw nothing
                prepared = method.prepare(
                    setup.model, setup.targets, scope=self.recipe.scope, bases=bases
                )
            self._record_method(prepared)
            self._train(setup, method, prepared, asked)

    def _bases(self, setup: Setup) -> dict[str, Basis]:
        """The recipe's basis, this run's own when resuming, or a fresh one."""
        given = self.recipe.calibration.basis
        own = self.record.path / BASIS_NAME
        path = Path(given).expanduser() if given else own
        if not given and not (self.resume and own.is_file()):
            return self.calibrated(setup).by_target()
        basis = read_basis(path)
        where = self.loaded.where("calibration.basis") if given else str(own)
        check_belongs(basis, setup.targets, setup.fingerprint, where)
        # What the basis cost when it was made is charged to this run too.
        self.seconds["calibrate_s"] = float(basis.settings.get("seconds") or 0.0)
        self.record.save(
            calibration={
                **basis.settings,
                "basis_file": str(path),
                "basis_bytes": sum(b.nbytes() for b in basis.bases.values()),
                "reused": True,
                "digest": basis.digest,
                "spectra": spectra(_one_per_kind(dict(basis.bases), setup)),
            }
        )
        return basis.by_target()

    def _record_method(self, prepared: Prepared) -> None:
        settings = self.recipe.method.model_dump()
        self.record.save(
            method={
                "name": settings.pop("name"),
                "form": settings.get("form"),
                "support": settings.get("support"),
                "density": settings.get("density"),
                "scope": self.recipe.scope,
                "settings": settings,
            },
            counts=prepared.counts.to_json(),
        )

    def _train(
        self, setup: Setup, method: Method, prepared: Prepared, asked: threading.Event
    ) -> None:
        from transformers import EarlyStoppingCallback

        train = self.recipe.train
        history: list[dict[str, Any]] = []
        recorder = RecordCallback(self.record.path, self.observer, history)
        interrupter = InterruptCallback(asked)
        callbacks: list[Any] = [recorder, interrupter]
        if train.early_stopping_patience is not None:
            callbacks.append(EarlyStoppingCallback(train.early_stopping_patience))
        trainer = SparsegradTrainer(
            recipe=self.recipe,
            method=method,
            spec=setup.task.spec,
            validation=setup.validation,
            model=setup.model,
            args=training_arguments(self.recipe, self.record.path),
            train_dataset=setup.train_data,
            data_collator=setup.collator,
            processing_class=setup.tokenizer,
            callbacks=callbacks,
        )
        _quiet(trainer)
        recorder.trainer = interrupter.trainer = trainer
        trainer.create_optimizer()
        self.meter.watch(setup.model, bases=prepared.bases, optimizer=trainer.optimizer)
        trainer.add_callback(ProbeCallback(self.meter, lambda: self._probe(setup, trainer)))
        last = files.last_checkpoint(self.record.path) if self.resume else None
        initial = None
        if last is None:
            self.observer.phase("evaluate", "before the first step")
            trainer.evaluate()
            initial = trainer.last_evaluation
        self.observer.phase("train", self.recipe.method.name)
        torch.manual_seed(self.recipe.seed)  # dropout is the same whatever was drawn before
        started, evaluated = time.perf_counter(), trainer.evaluate_seconds
        trainer.train(resume_from_checkpoint=str(last) if last else None)
        within = trainer.evaluate_seconds - evaluated
        self.seconds["train_s"] = time.perf_counter() - started - within
        self.observer.phase("evaluate", "best model")
        self._finish(setup, method, trainer, recorder, initial)
        self.seconds["evaluate_s"] = trainer.evaluate_seconds
        self.record.data["time"].update(self.seconds)

    def _finish(
        self,
        setup: Setup,
        method: Method,
        trainer: SparsegradTrainer,
        recorder: RecordCallback,
        initial: dict[str, Any] | None,
    ) -> None:
        """Record what came out and save the adapter."""
        history = recorder.history
        if not history or history[-1]["step"] != trainer.state.global_step:
            trainer.evaluate()
        final = history[-1]
        best_kept = trainer.args.load_best_model_at_end
        best = max(history, key=lambda r: r["score"]) if best_kept else final
        initial = initial or next((r for r in history if r["step"] == 0), None)
        timing = recorder.timer.summary()
        adapter = self.record.path / "adapter" / "adapter.safetensors"
        files.save_tensors(
            adapter,
            method.adapter_tensors(setup.model),
            {"method": method.name, "recipe_digest": self.record.data["recipe_digest"]},
        )
        steps = trainer.state.global_step
        self.record.save(
            metrics={
                "initial": initial,
                "best": best,
                "final": final,
                "history": history,
                "train": recorder.train_log,
                "notes": trainer.score_notes,
            },
            memory={**self.meter.report(), "batch_shape": self.batch_shape},
            time={
                "steps": steps,
                **timing,
                "examples_per_s": timing["steps_per_s"]
                * trainer.args.train_batch_size
                * trainer.args.gradient_accumulation_steps,
            },
            hashes={**self.record.data["hashes"], "order": trainer.order.kept},
            sizes={"adapter_bytes": adapter.stat().st_size},
        )

    def _probe(self, setup: Setup, trainer: SparsegradTrainer) -> None:
        """Forward, backward and evaluation on the longest examples; see ProbeCallback."""
        train = self.recipe.train
        model = setup.model
        rows = longest_batch(setup.train_data, train.per_device_train_batch_size)
        batch = to_device(setup.collator([_inputs(r) for r in rows]), setup.device)
        self.batch_shape = list(batch["input_ids"].shape)
        with forked_random(self.recipe.seed):
            model.train()
            with self.meter.phase("forward"), trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(model, dict(batch))
            with self.meter.phase("backward"):
                loss.backward()
        del loss
        model.zero_grad(set_to_none=True)
        validation = next(iter(setup.validation.values()))
        rows = longest_batch(validation, train.per_device_eval_batch_size)
        batch = to_device(setup.collator([_inputs(r) for r in rows]), setup.device)
        model.eval()
        with torch.no_grad(), self.meter.phase("evaluate"), trainer.compute_loss_context_manager():
            trainer.compute_loss(model, dict(batch))
        model.train()


def _inputs(row: dict[str, Any]) -> dict[str, Any]:
    names = ("input_ids", "attention_mask", "token_type_ids", "labels")
    return {name: row[name] for name in names if name in row}


def _quiet(trainer: SparsegradTrainer) -> None:
    """Progress is the observer's: drop transformers' own printing."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
