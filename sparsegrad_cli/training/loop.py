"""A training run from a model made ready to record, adapter and checkpoints."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparsegrad_cli import distributed, interruption
from sparsegrad_cli.data.collate import longest_batch
from sparsegrad_cli.io.paths import remove_folder
from sparsegrad_cli.methods.base import Method, Prepared
from sparsegrad_cli.numerics.seeding import temporary_seed
from sparsegrad_cli.recipe.load_recipe import digest
from sparsegrad_cli.records.metric_direction import scale_of
from sparsegrad_cli.records.run import HashesBlock, SizesBlock, TimeBlock
from sparsegrad_cli.run.checkpoints import Shelf, evaluation_due, step_of, trainer_state
from sparsegrad_cli.run.folder import ADAPTER
from sparsegrad_cli.run.launcher import DEEPSPEED
from sparsegrad_cli.tasks.setup import Setup, to_device
from sparsegrad_cli.training.adapter_folder import drawn_parameters, save_adapter
from sparsegrad_cli.training.arguments import training_arguments
from sparsegrad_cli.training.callbacks import (
    InterruptCallback,
    ProbeCallback,
    RecordCallback,
    SaveAfterEvaluation,
)
from sparsegrad_cli.training.checkpointed_trainer import stopped_early
from sparsegrad_cli.training.fsdp import settle
from sparsegrad_cli.training.resume_checks import blaming_checkpoint
from sparsegrad_cli.training.sparsity_stats import sparsity_map, with_touched
from sparsegrad_cli.training.trainer import SparsegradTrainer

if TYPE_CHECKING:
    from sparsegrad_cli.training.session import Session

# Schedules that do not look at the number of steps.
_WITHOUT_END = ("constant", "constant_with_warmup", "inverse_sqrt")
_STEPS_KEPT = 10_000  # durations in a checkpoint


class TrainingLoop:
    """One run's training.

    Args:
        session: has loaded, calibrated and recorded so far.
        setup, method, prepared: the model, and what has made it ready.
        resume: go on from the newest whole checkpoint, if there is one.
    """

    def __init__(
        self,
        session: Session,
        setup: Setup,
        method: Method,
        prepared: Prepared,
        *,
        resume: bool,
    ) -> None:
        self.session, self.setup, self.method, self.resume = session, setup, method, resume
        self._prepared = prepared.counts
        self._batch_shape: list[int] | None = None
        self._drawn = drawn_parameters(method, setup)
        self._began = time.perf_counter()
        self.recorder = RecordCallback(session.record.path, session.observer, [], str(setup.device))
        self.trainer = self._trainer()
        session.record.save(split_by=self.trainer.split_by)
        self.optimizer = self.trainer.create_optimizer()
        session.meter.watch(setup.model, bases=prepared.bases, optimizer=self.optimizer)
        session.known.trainer, session.known.bases = self.trainer, tuple(prepared.bases)

    def run(self) -> None:
        """Train, or go on training, to the end; record it, save the adapter."""
        session, trainer = self.session, self.trainer
        last = distributed.from_rank_zero(self._found) if self.resume else None
        trainer.shelf.newest = last
        start = step_of(last) if last else None
        self.recorder.cut(start, evaluated=last is None or not evaluation_due(last))
        session.record.forget_results()
        session.record.save(resumed_from=(start or 0) if self.resume else None)
        initial = None
        if last is None:
            session.enter("evaluate", "before the first step")
            trainer.evaluate_untrained()
            initial = trainer.last_evaluation
        self._say_extended(last)
        session.enter("train", session.recipe.method.name)
        torch.manual_seed(session.recipe.seed)  # dropout is the same whatever was drawn before
        self._began = time.perf_counter() - trainer.evaluate_seconds
        with blaming_checkpoint(last, trainer):
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        session.seconds["train_s"] = self._measured()["train_s"]
        session.enter("evaluate", "best model")
        setup, counts = self.setup, session.record.record.counts
        assert counts is not None  # recorded before the loop is made
        session.record.save(
            counts=with_touched(counts, self._prepared, setup.model, self.optimizer),
            sparsity=sparsity_map(setup.targets, setup.model, self.optimizer),
        )
        self._finish(initial)
        session.seconds["evaluate_s"] = trainer.evaluate_seconds
        times = session.record.record.time or TimeBlock()
        session.record.save(time=times.changed(**session.seconds))
        if distributed.is_rank_zero():
            trainer.shelf.finish(trainer.best_checkpoint)

    def _say_extended(self, last: Path | None) -> None:
        """Say what becomes of the learning rates of an extended run, and remove its old adapter."""
        record, train = self.session.record, self.session.recipe.train
        extended = record.record.extended
        if not extended or extended[-1].schedule is not None:
            return
        kind, total = train.lr_scheduler_type, self.trainer.steps_in_all()
        if last is None:
            words = "no checkpoint is left: training starts again from step 0"
        else:
            state = trainer_state(last)
            before = int(state["max_steps"])
            words = f"extended from {before} to {total} steps, from {last.name}"
            if kind in _WITHOUT_END and not 0 < train.warmup_steps < 1:
                words += f": lr_scheduler_type {kind} is the same for any length"
            else:
                words += (
                    f": lr_scheduler_type {kind} is recomputed over {total} steps; a run of "
                    f"{total} steps from the start has other learning rates before {last.name}"
                )
            if stopped_early(state):
                words += f". Early stopping ended it at step {state['global_step']}: it stays ended"
        last_one = extended[-1].changed(steps=total, schedule=words)
        record.save(extended=[*extended[:-1], last_one])
        self.session.observer.note(words)
        if distributed.is_rank_zero():
            remove_folder(record.path / ADAPTER.parent)

    def _found(self) -> Path | None:
        return self.trainer.shelf.find(self.session.observer.note)

    def _trainer(self) -> SparsegradTrainer:
        from transformers import EarlyStoppingCallback

        session, setup, train = self.session, self.setup, self.session.recipe.train
        interrupter = InterruptCallback()
        callbacks: list[Any] = [self.recorder, interrupter, SaveAfterEvaluation()]
        if train.early_stopping_patience is not None:
            callbacks.append(EarlyStoppingCallback(train.early_stopping_patience))
        folder = session.record.path
        arguments = training_arguments(session.recipe, folder, setup.objective.metric)
        so_far = session.record.record
        trainer = SparsegradTrainer(
            recipe=session.recipe,
            method=self.method,
            objective=setup.objective,
            validation=setup.validation,
            shelf=Shelf(
                folder,
                digest(session.recipe),
                limit=train.save_total_limit,
                keep_best=arguments.load_best_model_at_end,
                earlier=[str(was.recipe_digest) for was in so_far.extended],
            ),
            origins={
                "basis": so_far.calibration.digest if so_far.calibration else None,
                "data": setup.task.data_hash,
                "model": setup.fingerprint,
                "start": so_far.init_from.digest if so_far.init_from else None,
            },
            model=setup.model,
            args=arguments,
            train_dataset=setup.train_data,
            data_collator=setup.collator,
            processing_class=setup.tokenizer,
            callbacks=callbacks,
        )
        _quiet(trainer)
        _dvclive_in(folder, trainer)
        settle(trainer, setup.model, setup.targets, session.observer.note)
        if trainer.split_by != DEEPSPEED:  # whose engine takes every backward pass for its own
            trainer.add_callback(ProbeCallback(session.meter, self._probe))
        trainer.measured = self._measured
        self.recorder.trainer = interrupter.trainer = trainer
        return trainer

    def _measured(self) -> dict[str, Any]:
        """What a checkpoint keeps of time and memory."""
        before = self.trainer.resumed.measured if self.trainer.resumed else {}
        here = time.perf_counter() - self._began - self.trainer.evaluate_seconds
        memory = {**self.session.meter.report(), "batch_shape": self._batch_shape}
        if "backward" not in memory["phases"]:  # measured before a kill, and past that step now
            memory = before.get("memory", memory)
        return {
            "train_s": before.get("train_s", 0.0) + here,
            "steps_s": self.recorder.timer.durations[-_STEPS_KEPT:],
            "memory": memory,
        }

    def _finish(self, initial: dict[str, Any] | None) -> None:
        """Record what came out and save the adapter."""
        session, trainer, recorder = self.session, self.trainer, self.recorder
        history = recorder.history
        if not history or history[-1]["step"] != trainer.state.global_step:
            trainer.evaluate()
        final = history[-1]
        best_kept = trainer.args.load_best_model_at_end
        best = final
        # Of what was trained: before the first step there is nothing that could be kept.
        trained = [record for record in history if record["step"] > 0]
        if best_kept and trained:
            chosen = scale_of(self.setup.objective.metric).best(
                record["score"] for record in trained
            )
            best = next(record for record in trained if record["score"] == chosen)
        initial = initial or next((r for r in history if r["step"] == 0), None)
        timing = recorder.timer.summary()
        self._save_adapter()
        session.meter.watch(self.setup.model)  # looks again: bounded state has grown since
        sizes = session.record.record.sizes or SizesBlock()
        hashes = session.record.record.hashes or HashesBlock()
        steps = trainer.state.global_step
        session.record.save(
            metrics={
                "initial": initial,
                "best": best,
                "final": final,
                "history": history,
                "train": recorder.train_log,
                "notes": trainer.score_notes,
            },
            memory=self._measured()["memory"],
            time={
                "steps": steps,
                **timing,
                "examples_per_s": timing["steps_per_s"]
                * trainer.args.train_batch_size
                * trainer.args.gradient_accumulation_steps
                * distributed.world_size(),
            },
            sizes=sizes.changed(optimizer_state_bytes=session.meter.live()["optimizer_state"]),
            hashes=hashes.changed(order=trainer.order.kept, rows=trainer.order.kept_rows),
        )

    def _save_adapter(self) -> None:
        record = self.session.record
        about = {"method": self.method.name, "recipe_digest": str(record.record.recipe_digest)}
        section = self.session.recipe.model
        path = save_adapter(record.path, self.method, self.setup, section, self._drawn, about)
        if not distributed.is_rank_zero():
            return
        record.save(
            sizes={
                "adapter_bytes": path.stat().st_size,
                "gradient_bytes_per_step": distributed.gradient_bytes(self.trainer.model_wrapped),
            }
        )

    def _probe(self) -> None:
        """Forward, backward and evaluation on the longest examples; see ProbeCallback.

        Of a step in micro-batches it is a later one: gradients of earlier ones are there.
        """
        setup, trainer, meter = self.setup, self.trainer, self.session.meter
        train, model = self.session.recipe.train, setup.model
        rows = longest_batch(setup.train_data, train.per_device_train_batch_size)
        batch = to_device(setup.collator(rows), setup.device)
        self._batch_shape = list(batch["input_ids"].shape)
        if (
            interruption.requested()
        ):  # training ends after this step: what was not measured stays unknown
            return
        with temporary_seed(self.session.recipe.seed):
            model.train()
            if train.gradient_accumulation_steps > 1:
                small = to_device(setup.collator(rows[:1]), setup.device)
                with trainer.compute_loss_context_manager():
                    loss = trainer.compute_loss(model, small)
                loss.backward()
                del loss
            with meter.phase("forward"), trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(model, dict(batch))
            with meter.phase("backward"):
                loss.backward()
        del loss
        model.zero_grad(set_to_none=True)
        validation = next(iter(setup.validation.values()))
        rows = longest_batch(validation, train.per_device_eval_batch_size)
        batch = to_device(setup.collator(rows), setup.device)
        model.eval()
        with torch.no_grad(), meter.phase("evaluate"), trainer.compute_loss_context_manager():
            trainer.compute_loss(model, dict(batch))
        model.train()


def _dvclive_in(folder: Path, trainer: SparsegradTrainer) -> None:
    """DVCLive alone is told by its maker where to write, not by the environment."""
    from transformers.integrations import DVCLiveCallback

    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, DVCLiveCallback):
            from dvclive import Live  # type: ignore[import-not-found]

            callback.live = Live(dir=str(folder / "dvclive"))


def _quiet(trainer: SparsegradTrainer) -> None:
    """Progress is the observer's: drop transformers' own printing."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
