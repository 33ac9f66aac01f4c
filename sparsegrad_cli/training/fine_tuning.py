"""A training run, from recipe to record, adapter and checkpoints."""

from __future__ import annotations

import threading
import time
from typing import Any

import torch

from sparsegrad_cli import ranks
from sparsegrad_cli.data.collate import longest_batch
from sparsegrad_cli.errors import InterruptedRunError
from sparsegrad_cli.methods.base import Method, Prepared
from sparsegrad_cli.methods.table import make_method
from sparsegrad_cli.observer import Observer
from sparsegrad_cli.paths import expanded
from sparsegrad_cli.recipe.loading import LoadedRecipe
from sparsegrad_cli.recipe.method_section import SparsegradMethod
from sparsegrad_cli.rundir import RunRecord
from sparsegrad_cli.scales import scale_of
from sparsegrad_cli.training import checkpoint as files
from sparsegrad_cli.training.arguments import training_arguments
from sparsegrad_cli.training.basis_file import (
    BasisFile,
    check_belongs,
    check_rank,
    read_basis,
)
from sparsegrad_cli.training.calibration import Calibration
from sparsegrad_cli.training.callbacks import (
    InterruptCallback,
    ProbeCallback,
    RecordCallback,
    graceful_interrupt,
)
from sparsegrad_cli.training.diagnostics import spectra
from sparsegrad_cli.training.going_on import blaming_checkpoint
from sparsegrad_cli.training.gradients import forked_random
from sparsegrad_cli.training.session import BASIS_NAME, Session, one_per_kind
from sparsegrad_cli.training.setup import Setup, to_device
from sparsegrad_cli.training.touched import sparsity_map, with_touched
from sparsegrad_cli.training.trainer import SparsegradTrainer


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
            method = make_method(self.method)
            prepared = self._prepared(setup, method, asked)
            self._record_method(prepared)
            self._train(setup, method, prepared, asked)

    def _prepared(self, setup: Setup, method: Method, asked: threading.Event) -> Prepared:
        """The model made ready. Bases live on only in what the method keeps of them."""
        found = self._calibrated(setup) if method.needs_basis else None
        if asked.is_set():
            raise InterruptedRunError("stopped before training began", fix="--resume starts it")
        with forked_random(self.recipe.seed):  # peft draws A; the others draw nothing
            return method.prepare(
                setup.model,
                setup.targets,
                scope=self.recipe.scope,
                bases=found.by_target() if found else None,
                scores=found.scores if found else None,
            )

    def _calibrated(self, setup: Setup) -> Calibration | BasisFile:
        """The recipe's basis, this run's own when resuming, or a fresh one."""
        given = self.recipe.calibration.basis
        own = self.record.path / BASIS_NAME
        path = expanded(given) if given else own
        if not given and not (self.resume and own.is_file()):
            return self.calibrated(setup)
        basis = read_basis(path)
        where = self.loaded.where("calibration.basis") if given else str(own)
        check_belongs(basis, setup.targets, setup.fingerprint, where)
        method = self.method
        if not isinstance(method, SparsegradMethod) or method.form != "core":
            check_rank(basis, None, where)
        elif isinstance(method.rank, int):
            check_rank(basis, method.rank, where)
        # What the basis cost when it was made is charged to this run too.
        self.seconds["calibrate_s"] = float(basis.settings.get("seconds") or 0.0)
        self.record.save(
            calibration={
                **basis.settings,
                "basis_file": str(path),
                "basis_bytes": sum(b.nbytes() for b in basis.bases.values()),
                "reused": True,
                "digest": basis.digest,
                "spectra": spectra(one_per_kind(dict(basis.bases), setup)),
            }
        )
        if self.recipe.calibration.keep_head and not self.resume:
            with self.warmed_head(setup):
                pass
        return basis

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
            objective=setup.objective,
            validation=setup.validation,
            model=setup.model,
            args=training_arguments(self.recipe, self.record.path, setup.objective.metric),
            train_dataset=setup.train_data,
            data_collator=setup.collator,
            processing_class=setup.tokenizer,
            callbacks=callbacks,
        )
        _quiet(trainer)
        recorder.trainer = interrupter.trainer = trainer
        optimizer = trainer.create_optimizer()
        self.meter.watch(setup.model, bases=prepared.bases, optimizer=optimizer)
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
        with blaming_checkpoint(last, trainer):
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        within = trainer.evaluate_seconds - evaluated
        self.seconds["train_s"] = time.perf_counter() - started - within
        self.observer.phase("evaluate", "best model")
        self.record.save(
            counts=with_touched(
                self.record.data["counts"], prepared.counts, setup.model, optimizer
            ),
            sparsity=sparsity_map(setup.targets, setup.model, optimizer),
        )
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
        best = final
        # Of what was trained: before the first step there is nothing that could be kept.
        trained = [record for record in history if record["step"] > 0]
        if best_kept and trained:
            chosen = scale_of(setup.objective.metric).best(record["score"] for record in trained)
            best = next(record for record in trained if record["score"] == chosen)
        initial = initial or next((r for r in history if r["step"] == 0), None)
        timing = recorder.timer.summary()
        if ranks.is_first():
            self._save_adapter(setup, method)
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
                * trainer.args.gradient_accumulation_steps
                * ranks.count(),
            },
            hashes={**self.record.data["hashes"], "order": trainer.order.kept},
        )

    def _save_adapter(self, setup: Setup, method: Method) -> None:
        path = self.record.path / "adapter" / "adapter.safetensors"
        files.save_tensors(
            path,
            method.adapter_tensors(setup.model),
            {"method": method.name, "recipe_digest": self.record.data["recipe_digest"]},
        )
        self.record.save(sizes={"adapter_bytes": path.stat().st_size})

    def _probe(self, setup: Setup, trainer: SparsegradTrainer) -> None:
        """Forward, backward and evaluation on the longest examples; see ProbeCallback."""
        train = self.recipe.train
        model = setup.model
        rows = longest_batch(setup.train_data, train.per_device_train_batch_size)
        batch = to_device(setup.collator(rows), setup.device)
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
        batch = to_device(setup.collator(rows), setup.device)
        model.eval()
        with torch.no_grad(), self.meter.phase("evaluate"), trainer.compute_loss_context_manager():
            trainer.compute_loss(model, dict(batch))
        model.train()


def _quiet(trainer: SparsegradTrainer) -> None:
    """Progress is the observer's: drop transformers' own printing."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
