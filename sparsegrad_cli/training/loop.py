"""A training run from a model made ready to record, adapter and checkpoints."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparsegrad_cli import distributed, interruption
from sparsegrad_cli.data.batches import longest_batch
from sparsegrad_cli.io.paths import remove_folder
from sparsegrad_cli.methods.implementation import Method, Prepared
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
    from sparsegrad_cli.run.open_run import Run

# Schedules that do not look at the number of steps.
_WITHOUT_END = ("constant", "constant_with_warmup", "inverse_sqrt")
_STEPS_KEPT = 10_000  # durations in a checkpoint


class TrainingLoop:
    """One run's training.

    Args:
        run: the open run.
        setup, method, prepared: the model, and what has made it ready.
    """

    def __init__(
        self,
        run: Run,
        setup: Setup,
        method: Method,
        prepared: Prepared,
    ) -> None:
        self._run, self.setup, self.method, self.resume = run, setup, method, run.resume
        self._prepared = prepared.counts
        self._batch_shape: list[int] | None = None
        self._drawn = drawn_parameters(method, setup)
        self._began = time.perf_counter()
        self.recorder = RecordCallback(run.path, run.observer, [], str(setup.device))
        self.trainer = self._trainer()
        run.writer.save(split_by=self.trainer.split_by)
        self.optimizer = self.trainer.create_optimizer()
        setup.meter.watch(setup.model, bases=prepared.bases, optimizer=self.optimizer)

    def run(self) -> None:
        """Train, or go on training, to the end; record it, save the adapter."""
        run, setup, trainer = self._run, self.setup, self.trainer
        last = distributed.from_rank_zero(self._found) if self.resume else None
        trainer.shelf.newest = last
        start = step_of(last) if last else None
        self.recorder.cut(start, evaluated=last is None or not evaluation_due(last))
        run.writer.forget_results()
        run.writer.save(resumed_from=(start or 0) if self.resume else None)
        initial = None
        if last is None:
            run.begin_phase("evaluate", "before the first step")
            trainer.evaluate_untrained()
            initial = trainer.last_evaluation
        self._say_extended(last)
        run.begin_phase("train", run.recipe.method.name)
        torch.manual_seed(run.recipe.seed)  # dropout is the same whatever was drawn before
        self._began = time.perf_counter() - trainer.evaluate_seconds
        with blaming_checkpoint(last, trainer):
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        run.seconds["train_s"] = self._measured()["train_s"]
        run.begin_phase("evaluate", "best model")
        counts = run.writer.record.counts
        assert counts is not None  # recorded before the loop is made
        run.writer.save(
            counts=with_touched(counts, self._prepared, setup.model, self.optimizer),
            sparsity=sparsity_map(setup.targets, setup.model, self.method, self.optimizer),
        )
        self._finish(initial)
        run.seconds["evaluate_s"] = trainer.evaluate_seconds
        times = run.writer.record.time or TimeBlock()
        run.writer.save(time=times.changed(**run.seconds))
        if distributed.is_rank_zero():
            trainer.shelf.finish(trainer.best_checkpoint)

    def _say_extended(self, last: Path | None) -> None:
        """Say what becomes of the learning rates of an extended run, and remove its old adapter."""
        record, train = self._run.writer, self._run.recipe.train
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
        self._run.observer.note(words)
        if distributed.is_rank_zero():
            remove_folder(record.path / ADAPTER.parent)

    def _found(self) -> Path | None:
        return self.trainer.shelf.find(self._run.observer.note)

    def _trainer(self) -> SparsegradTrainer:
        from transformers import EarlyStoppingCallback

        run, setup, train = self._run, self.setup, self._run.recipe.train
        interrupter = InterruptCallback()
        callbacks: list[Any] = [self.recorder, interrupter, SaveAfterEvaluation()]
        if train.early_stopping_patience is not None:
            callbacks.append(EarlyStoppingCallback(train.early_stopping_patience))
        folder = run.path
        arguments = training_arguments(run.recipe, folder, setup.objective.metric)
        so_far = run.writer.record
        trainer = SparsegradTrainer(
            recipe=run.recipe,
            method=self.method,
            objective=setup.objective,
            validation=setup.validation,
            shelf=Shelf(
                folder,
                digest(run.recipe),
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
        settle(trainer, setup.model, setup.targets, run.observer.note)
        if trainer.split_by != DEEPSPEED:  # whose engine takes every backward pass for its own
            trainer.add_callback(ProbeCallback(setup.meter, self._probe))
        trainer.measured = self._measured
        self.recorder.trainer = interrupter.trainer = trainer
        return trainer

    def _measured(self) -> dict[str, Any]:
        """What a checkpoint keeps of time and memory."""
        before = self.trainer.resumed.measured if self.trainer.resumed else {}
        here = time.perf_counter() - self._began - self.trainer.evaluate_seconds
        report = self.setup.meter.report().changed(batch_shape=self._batch_shape)
        memory = report.to_json()
        if "backward" not in memory["phases"]:  # measured before a kill, and past that step now
            memory = before.get("memory", memory)
        return {
            "train_s": before.get("train_s", 0.0) + here,
            "steps_s": self.recorder.timer.durations[-_STEPS_KEPT:],
            "memory": memory,
        }

    def _finish(self, initial: dict[str, Any] | None) -> None:
        """Record what came out and save the adapter."""
        run, setup, trainer, recorder = self._run, self.setup, self.trainer, self.recorder
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
        setup.meter.watch(setup.model)  # looks again: bounded state has grown since
        sizes = run.writer.record.sizes or SizesBlock()
        hashes = run.writer.record.hashes or HashesBlock()
        steps = trainer.state.global_step
        run.writer.save(
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
            sizes=sizes.changed(optimizer_state_bytes=setup.meter.live()["optimizer_state"]),
            hashes=hashes.changed(order=trainer.order.kept, rows=trainer.order.kept_rows),
        )

    def _save_adapter(self) -> None:
        record = self._run.writer
        about = {
            "method": self.method.settings.name,
            "recipe_digest": str(record.record.recipe_digest),
        }
        section = self._run.recipe.model
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
        setup, trainer, meter = self.setup, self.trainer, self.setup.meter
        train, model = self._run.recipe.train, setup.model
        rows = longest_batch(setup.train_data, train.per_device_train_batch_size)
        batch = to_device(setup.collator(rows), setup.device)
        self._batch_shape = list(batch["input_ids"].shape)
        if (
            interruption.requested()
        ):  # training ends after this step: what was not measured stays unknown
            return
        with temporary_seed(self._run.recipe.seed):
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
