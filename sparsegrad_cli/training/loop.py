"""The training loop: optimizer steps, evaluation, checkpoints, and the record of what came out.

accelerate prepares and steps. The keys of ``train:`` mean what transformers.TrainingArguments says.
What the run does next is a function of its last checkpoint, so that a resumed run continues bit for
bit (on a CPU) as if it had never stopped.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from sparsegrad_cli import distributed, interruption
from sparsegrad_cli.data.order import EpochSampler, OrderHash
from sparsegrad_cli.errors import FileFormatError, InterruptedRunError
from sparsegrad_cli.methods.implementation import Method, Prepared, trainable_state
from sparsegrad_cli.models.nan_check import check_weights
from sparsegrad_cli.recipe.load_recipe import digest
from sparsegrad_cli.records.metric_direction import scale_of
from sparsegrad_cli.records.run import Evaluation, TrainingLoss
from sparsegrad_cli.run.checkpoint_state import (
    CheckpointState,
    LoopState,
    Measured,
    OrderState,
    Progress,
    read_state,
)
from sparsegrad_cli.run.checkpoints import Checkpoints, damage
from sparsegrad_cli.run.launcher import DEEPSPEED
from sparsegrad_cli.tasks.setup import Setup
from sparsegrad_cli.training import checkpoint as files
from sparsegrad_cli.training.adapter_folder import drawn_parameters
from sparsegrad_cli.training.divergence import MicroBatch, diverged, diverged_elsewhere
from sparsegrad_cli.training.evaluation import judge_splits, validation_batches
from sparsegrad_cli.training.memory_probe import MemoryProbe
from sparsegrad_cli.training.outcome import note_extension, record_outcome
from sparsegrad_cli.training.parallel import make_accelerator, sharded_by
from sparsegrad_cli.training.schedule import StepPlan, make_scheduler
from sparsegrad_cli.training.step_log import StepLog
from sparsegrad_cli.training.tracking import make_trackers

if TYPE_CHECKING:
    from sparsegrad_cli.run.open_run import Run

_DURATIONS_KEPT = 10_000  # In a checkpoint.
# What a run is made of, in the order checked: another basis follows from other data.
_ORIGINS = {
    "data": ("on other data", "the data"),
    "model": ("on another base model", "the model"),
    "basis": ("in another basis", "basis.safetensors"),
    "start": ("from another adapter", "what init_from names"),
}


class TrainingLoop:
    """The training of one run.

    Args:
        run: The open run, resumed or new.
        setup: Data and model.
        method: Has prepared the model.
        prepared: What the method says of it.
    """

    def __init__(self, run: Run, setup: Setup, method: Method, prepared: Prepared) -> None:
        self.open_run, self.setup, self.method = run, setup, method
        self.recipe, self.train, self.writer = run.recipe, run.recipe.train, run.writer
        self.prepared = prepared
        self.drawn = drawn_parameters(method, setup)
        self.plan = StepPlan.of(self.train, len(setup.train_data))
        self.progress = Progress(max_steps=self.plan.max_steps)
        self.order = OrderHash(every=self.train.logging_steps)
        self.log = StepLog(run.path, run.observer, str(setup.device))
        self.notes: list[str] = []
        self.evaluate_seconds = 0.0
        self._began = time.perf_counter()
        self._before = Measured()  # Of the run until the checkpoint that it resumes from.
        self._steps_here = 0

        setup.model.config.use_cache = False  # type: ignore[union-attr]
        trackers = make_trackers(self.recipe, run.path, setup.model)
        self.accelerator = make_accelerator(self.train, setup, trackers, run.observer.note)
        self.sharded_by = sharded_by(self.accelerator)
        self.writer.save(split_by=self.sharded_by)
        self.optimizer = method.optimizer(setup.model, self.train)
        # DeepSpeed's engine would take the probe's backward passes for its own.
        self.probe = (
            None if self.sharded_by == DEEPSPEED else MemoryProbe(setup, self.recipe, self.loss)
        )
        setup.meter.watch(setup.model, bases=prepared.bases, optimizer=self.optimizer)
        so_far = run.writer.record
        self.checkpoints = Checkpoints(
            run.path,
            digest(self.recipe),
            limit=self.train.save_total_limit,
            keep_best=self.plan.keeps_best,
            earlier=[str(extension.recipe_digest) for extension in so_far.extended],
        )
        self._origins: dict[str, str | None] = {
            "data": setup.task.data_hash,
            "model": setup.fingerprint,
            "basis": so_far.calibration.digest if so_far.calibration else None,
            "start": so_far.init_from.digest if so_far.init_from else None,
        }

    def run(self) -> None:
        """Train, or continue to train, to the end; record the outcome and save the adapter."""
        run = self.open_run
        last = (
            distributed.from_rank_zero(lambda: self.checkpoints.find(run.observer.note))
            if run.resume
            else None
        )
        self.checkpoints.newest = last
        state = read_state(last) if last else None
        step = state.progress.step if state else None
        self.log.rewind(step, evaluated=state is None or not state.progress.evaluation_due)
        self.writer.forget_results()
        self.writer.save(resumed_from=(step or 0) if run.resume else None)
        self.accelerator.init_trackers(run.path.name)
        if state is None:
            run.begin_phase("evaluate", "before the first step")
            self._evaluate()
        note_extension(self, state)
        run.begin_phase("train", self.recipe.method.name)
        self._began = time.perf_counter() - self.evaluate_seconds
        with files.checkpoint_errors(last, lambda: self._steps_here > 0 or self.progress.over):
            self._prepare()
            if last is not None and state is not None:
                self._restore(last, state)
            self._train_to_the_end(last)
        run.seconds["train_s"] = self.measured().train_s
        run.begin_phase("evaluate", "best model")
        record_outcome(self)
        if distributed.is_rank_zero():
            self.checkpoints.finish(self.best_checkpoint)
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.free_memory()

    # --- before the first step

    def _prepare(self) -> None:
        """Seed, and let accelerate wrap or shard what trains."""
        from transformers import set_seed

        set_seed(self.recipe.seed)  # The same dropout, whatever was drawn before.
        setup, train = self.setup, self.train
        if train.gradient_checkpointing:
            setup.model.activation_checkpointing_enable()  # type: ignore[operator]
        self.sampler = EpochSampler(
            setup.train_data,
            seed=self.recipe.seed,
            strategy=train.train_sampling_strategy,
            lengths=[len(ids) for ids in setup.train_data["input_ids"]]
            if train.train_sampling_strategy == "group_by_length"
            else None,
            batch_size=train.per_device_train_batch_size
            * train.gradient_accumulation_steps
            * distributed.world_size(),
        )
        loader: Any = DataLoader(
            setup.train_data,
            batch_size=train.per_device_train_batch_size,
            sampler=self.sampler,
            collate_fn=setup.collator,
            num_workers=train.dataloader_num_workers,
            pin_memory=setup.device.type == "cuda",
        )
        self.wrapped, self.stepper, self.loader = self.accelerator.prepare(
            setup.model, self.optimizer, loader
        )
        self.scheduler = make_scheduler(self.stepper, self.plan)
        self._loss_sum = torch.zeros((), device=self.accelerator.device)
        self.open_run.observer.total_steps("train", self.plan.max_steps)

    def _restore(self, folder: Path, state: CheckpointState) -> None:
        """Continue where a checkpoint was written.

        Raises:
            FileFormatError: The checkpoint is damaged, or of a run that was made of other things.
        """
        for name, digest_then in state.origins.items():
            words, lost = _ORIGINS.get(name, ("otherwise", name))
            if digest_then != self._origins.get(name):
                raise FileFormatError(
                    f"{folder.name} was trained {words} than the run uses now",
                    where=str(folder),
                    fix=f"restore {lost} from a copy, or start again with --overwrite",
                )
        files.load_weights(folder, self.setup.model)
        files.load_optimizer(folder, self.optimizer, self.scheduler)
        if self.accelerator.scaler is not None and state.scaler:
            self.accelerator.scaler.load_state_dict(state.scaler)
        self.order.load_state(state.order.model_dump())
        if self.plan.max_steps > state.progress.max_steps:
            self.order.forget_last()
        self.progress = state.progress.model_copy(update={"max_steps": self.plan.max_steps})
        self._loss_sum += state.progress.loss_sums[distributed.rank()]
        self._before = state.measured
        self.log.timer.durations[:0] = state.measured.steps_s
        if state.progress.evaluation_due:
            files.load_random(folder)  # Into the checkpoint that this evaluation may leave.
            self._evaluate_and_save(evaluate=True, save=state.progress.save_due)

    # --- steps

    def _train_to_the_end(self, resumed_from: Path | None) -> None:
        """Take all steps that are left, and end with the best weights if the recipe says so."""
        plan, progress = self.plan, self.progress
        while not progress.over:
            self._stop_if_requested()
            epoch, done = divmod(progress.step, plan.steps_per_epoch)
            if not done and resumed_from is not None:
                files.load_random(resumed_from)
            batches = iter(self._batches_of(epoch, done * self.train.gradient_accumulation_steps))
            for _ in range(done, plan.steps_per_epoch):
                step_batches = list(islice(batches, self.train.gradient_accumulation_steps))
                # The loader has drawn its seed by now, as it had when the checkpoint was written.
                if done and resumed_from is not None:
                    files.load_random(resumed_from)
                resumed_from = None
                self._optimizer_step(step_batches)
                self._after_step()
                if progress.over:
                    break
                if not plan.ends_epoch(progress.step):
                    self._stop_if_requested()
        if plan.keeps_best:
            self._load_best_weights()

    def _batches_of(self, epoch: int, skipped: int) -> Any:
        """Return the loader of an epoch, after its first ``skipped`` batches."""
        loader: Any = self.loader
        if skipped:
            loader = self.accelerator.skip_first_batches(loader, skipped)
        loader.set_epoch(epoch)
        self.sampler.set_epoch(
            epoch
        )  # With several processes, a skipping loader does not reach it.
        return loader

    def _optimizer_step(self, batches: list[dict[str, Tensor]]) -> None:
        """Take one optimizer step of all micro-batches.

        Raises:
            NonFiniteError: A loss is NaN or infinite; the step is not taken.
        """
        step, deepspeed = self.progress.step + 1, self.sharded_by == DEEPSPEED
        self.log.timer.start()
        self.wrapped.train()
        items = torch.stack([self.setup.objective.items(batch) for batch in batches]).sum()
        distributed.all_reduce([items])
        for number, batch in enumerate(batches, start=1):
            self.accelerator.sync_gradients = last = number == len(batches)
            sync = last or deepspeed
            with nullcontext() if sync else self.accelerator.no_sync(self.wrapped):
                self._loss_sum += self._backward(batch, items, step, number, len(batches))
        norm = None
        if self.train.max_grad_norm > 0:
            parameters = self.wrapped.parameters()
            norm = self.accelerator.clip_grad_norm_(parameters, self.train.max_grad_norm)
        ends = step == self.plan.max_steps
        with self.probe.measured_step(last=ends) if self.probe else nullcontext():
            self.stepper.step()
        self.learning_rate = float(self.scheduler.get_last_lr()[0])
        self.gradient_norm = None if norm is None else float(norm)
        if not self.accelerator.optimizer_step_was_skipped:
            self.scheduler.step()
        self.wrapped.zero_grad()
        self.progress.step = step
        self._steps_here += 1
        self.log.timer.stop()
        self.order.mark(step, last=ends)
        self.log.step_done(step)
        if self.probe:
            self.probe.after_step(last=ends)

    def _backward(
        self, batch: dict[str, Tensor], items: Tensor, step: int, number: int, count: int
    ) -> Tensor:
        """Add the gradients of one micro-batch; return its part of the step's loss.

        Every item of a step has the same weight, in whatever micro-batch and process it lies:
        gradients are averaged over processes, hence the factor ``world_size``.

        Args:
            batch: On the model's device.
            items: Labelled tokens or rows of the step, in all processes.
            step, number, count: The optimizer step; the micro-batch's number in it, and how many.
        """
        objective, world_size = self.setup.objective, distributed.world_size()
        self.order.add(batch)
        with self.accelerator.autocast():
            if objective.by_token:
                loss = objective.loss(self.wrapped, batch, items) * world_size
            else:
                share = int(objective.items(batch)) * count * world_size / int(items)
                loss = objective.loss(self.wrapped, batch)
                loss = (loss if share == 1 else loss * share) / count
        # The engine would divide once more.
        options = {"scale_wrt_gas": False} if self.sharded_by == DEEPSPEED else {}
        self.accelerator.backward(loss, **options)
        loss = loss.detach()
        lost = not bool(torch.isfinite(loss))
        if distributed.any(lost):  # Gradients are summed, so it is lost in all processes.
            self._raise_diverged(batch, loss, lost, step, number, count)
        return loss

    def _raise_diverged(
        self, batch: dict[str, Tensor], loss: Tensor, lost: bool, step: int, number: int, count: int
    ) -> None:
        rate = float(self.scheduler.get_last_lr()[0])
        rows: list[int] = []
        if distributed.world_size() == 1:
            size = self.train.per_device_train_batch_size
            in_epoch = (step - 1) % self.plan.steps_per_epoch
            start = (in_epoch * self.train.gradient_accumulation_steps + number - 1) * size
            rows = list(self.sampler)[start : start + size]
        where = MicroBatch(batch, step, number, count, rows)
        newest = self.checkpoints.newest
        # Sharded weights need every process to look for the module.
        if lost or self.sharded_by:
            error = diverged(
                where,
                float(loss),
                where.proven_rows(self.setup.train_data, self.setup.collator),
                self.setup.model,
                partial(self.loss, batch),
                learning_rate=rate,
                checkpoint=newest.name if newest else None,
            )
            if lost:
                raise error
        raise diverged_elsewhere(step, rate)

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Compute the loss of a batch by itself, outside of a step."""
        with self.accelerator.autocast():
            return self.setup.objective.loss(self.setup.model, batch)

    def _after_step(self) -> None:
        """Log, evaluate and save what is due after a step, in this order."""
        step = self.progress.step
        if self.plan.logs_after(step):
            self._log_loss()
        self._evaluate_and_save(
            evaluate=self.plan.evaluates_after(step), save=self.plan.saves_after(step)
        )

    def _log_loss(self) -> None:
        """Log the mean training loss over the steps since it was last logged."""
        progress, total = self.progress, self._loss_sum.clone()
        distributed.all_reduce([total])
        mean = float(total) / distributed.world_size() / (progress.step - progress.logged_step)
        self._loss_sum.zero_()
        progress.logged_step = progress.step
        epoch = self.plan.epoch_after(progress.step)
        self.log.add_loss(
            TrainingLoss(
                step=progress.step,
                epoch=round(epoch, 4),
                loss=mean,
                learning_rate=self.learning_rate,
            )
        )
        values = {"loss": mean, "learning_rate": self.learning_rate, "epoch": epoch}
        if self.gradient_norm is not None:
            values["grad_norm"] = self.gradient_norm
        self.accelerator.log(values, step=progress.step)

    def _stop_if_requested(self) -> None:
        """Stop between two steps, with a checkpoint, if the user asked for it.

        All processes stop after the same step.
        """
        progress = self.progress
        if not interruption.requested():
            interruption.set_activity(f"step {progress.step + 1}")
            return
        if progress.step == 0:
            raise InterruptedRunError("stopped before the first step", fix="start it with --resume")
        folder = self._save_now()
        raise InterruptedRunError(
            f"stopped after step {progress.step} of {progress.max_steps}; {folder.name} is saved",
            fix="continue with --resume",
        )

    # --- evaluation

    def _evaluate_and_save(self, *, evaluate: bool, save: bool) -> None:
        """Evaluate and save; what is interrupted is due again when the run is resumed."""
        progress, strategy = self.progress, self.plan.save_strategy
        if evaluate:
            progress.evaluation_due, progress.save_due = True, save
            try:
                score = self._evaluate().score
            except InterruptedRunError as stopped:
                folder = self._save_now()
                stopped.what = (
                    f"stopped in the evaluation after step {progress.step} of "
                    f"{progress.max_steps}; {folder.name} is saved"
                )
                stopped.fix = "use --resume, which repeats that evaluation first"
                raise
            progress.evaluation_due = progress.save_due = False
            assert score is not None
            scale = scale_of(self.setup.objective.metric)
            best = progress.best_score
            improved = best is None or (score != best and scale.best((score, best)) == score)
            if improved:
                progress.best_score, progress.best_step = score, progress.step
                progress.evaluations_since_best = 0
            else:
                progress.evaluations_since_best += 1
            patience = self.train.early_stopping_patience
            progress.stopped_early = (
                patience is not None and progress.evaluations_since_best >= patience
            )
            save = save or (strategy == "best" and improved)
            save = save or (strategy == "epoch" and progress.stopped_early)
        if save:
            self._save_checkpoint()

    def _evaluate(self) -> Evaluation:
        """Judge the model as it is now on all validation splits, and log it."""
        started = time.perf_counter()
        objective, step = self.setup.objective, self.progress.step
        batches_of = partial(
            validation_batches,
            collator=self.setup.collator,
            batch_size=self.train.per_device_eval_batch_size,
            device=self.setup.device,
            workers=self.train.dataloader_num_workers,
        )
        judgements = judge_splits(
            objective,
            self.setup.model,
            self.setup.validation,
            batches_of,
            self.accelerator.autocast,
        )
        first = next(iter(judgements.values()))  # The one that selects the best model.
        epoch = self.plan.epoch_after(step)
        evaluation = Evaluation(
            step=step,
            epoch=epoch,
            metric=objective.metric,
            score=first.values[objective.metric],
            loss=first.loss,
            values={name: dict(judged.values) for name, judged in judgements.items()},
        )
        for note in dict.fromkeys(note for each in judgements.values() for note in each.notes):
            if (text := f"step {step}: {note}") not in self.notes:
                self.notes.append(text)
        self.evaluate_seconds += time.perf_counter() - started
        self.log.add_evaluation(evaluation)
        flat = {"eval_score": evaluation.score, "eval_loss": evaluation.loss, "epoch": epoch}
        for name, judged in judgements.items():
            flat |= {f"eval_{name}_{key}": value for key, value in judged.values.items()}
        self.accelerator.log(flat, step=step)
        return evaluation

    def final_evaluation(self) -> Evaluation:
        """Return the evaluation of the last step; make it if the schedule has none there."""
        evaluations, step = self.log.evaluations, self.progress.step
        if evaluations and evaluations[-1].step == step:
            return evaluations[-1]
        try:
            return self._evaluate()
        except InterruptedRunError:
            if not self.plan.keeps_best:  # Or the weights may be those of another step.
                self._save_now()
            raise

    # --- checkpoints

    @property
    def best_checkpoint(self) -> Path | None:
        """The checkpoint of the best evaluation so far, which may not have been kept."""
        best = self.progress.best_step
        return None if best is None else self.checkpoints.place(best)

    def _save_checkpoint(self) -> None:
        """Write checkpoint-N whole or not at all, then drop those over save_total_limit."""
        step = self.progress.step
        interruption.set_activity(f"writing checkpoint-{step}")
        check_weights(self.setup.model, step)  # A bad checkpoint must not replace a good one.
        # Each process draws its own numbers and sums its own losses; sharded tensors are gathered.
        random_states = distributed.all_gather(files.random_state())
        self.progress.loss_sums = distributed.all_gather(float(self._loss_sum))
        weights, optimizer = trainable_state(self.setup.model), files.whole_state(self.optimizer)
        scaler = self.accelerator.scaler
        state = LoopState(
            progress=self.progress,
            order=OrderState.model_validate(self.order.state()),
            origins=self._origins,
            measured=self.measured(),
            scaler=None if scaler is None else scaler.state_dict(),
        )

        def fill(folder: Path) -> None:
            files.write_checkpoint(folder, state, weights, optimizer, self.scheduler, random_states)

        # The first process writes. If it fails, the others do not wait for it for ever.
        self.checkpoints.newest = distributed.from_rank_zero(
            lambda: self.checkpoints.write(step, fill, self.best_checkpoint)
        )

    def _save_now(self) -> Path:
        """Write a checkpoint of this step before the run stops, if there is none yet.

        Raises:
            InterruptedRunError: Under DeepSpeed, which has no checkpoints.
        """
        if self.sharded_by == DEEPSPEED:
            raise InterruptedRunError(
                f"stopped after step {self.progress.step}; DeepSpeed's state is not saved",
                fix="start again with --overwrite",
            )
        folder = self.checkpoints.place(self.progress.step)
        if folder != self.checkpoints.newest:
            self._save_checkpoint()
        return folder

    def _load_best_weights(self) -> None:
        best = self.best_checkpoint
        if best is None:
            return
        wrong = damage(best)
        if wrong is not None:
            raise FileFormatError(
                f"{best.name}, the best checkpoint, has been damaged since: {wrong}",
                where=str(best),
                fix="--resume trains again from the checkpoint before",
            )
        files.load_weights(best, self.setup.model)

    def measured(self) -> Measured:
        """Return times and memory of the whole run so far."""
        here = time.perf_counter() - self._began - self.evaluate_seconds
        shape = self.probe.batch_shape if self.probe else None
        memory = self.setup.meter.report().changed(batch_shape=shape)
        if "backward" not in memory.phases and self._before.memory:
            memory = self._before.memory  # Measured before the run stopped; that step is past.
        return Measured(
            train_s=self._before.train_s + here,
            steps_s=self.log.timer.durations[-_DURATIONS_KEPT:],
            memory=memory,
        )
