"""The training loop: optimizer steps, evaluation, checkpoints, and the record of what came out.

accelerate prepares and steps. The keys of ``train:`` mean what transformers.TrainingArguments says.
What the run does next is a function of its last checkpoint, so that a resumed run continues bit for
bit (on a CPU) as if it had never stopped.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from sparsegrad_cli import distributed, interruption
from sparsegrad_cli.data.order import OrderHash
from sparsegrad_cli.errors import InterruptedRunError
from sparsegrad_cli.methods.implementation import Method, Prepared, trainable_state
from sparsegrad_cli.models.nan_check import check_weights
from sparsegrad_cli.recipe.load_recipe import digest
from sparsegrad_cli.records.run import Evaluation, TrainingLoss
from sparsegrad_cli.restore.adapter_folder import drawn_parameters
from sparsegrad_cli.run.checkpoint_state import (
    CheckpointState,
    LoopState,
    Measured,
    OrderState,
    Progress,
    read_state,
)
from sparsegrad_cli.run.checkpoints import Checkpoints
from sparsegrad_cli.run.launcher import DEEPSPEED
from sparsegrad_cli.tasks.setup import Setup
from sparsegrad_cli.training import checkpoint as files
from sparsegrad_cli.training.accelerator import make_accelerator, sharded_by
from sparsegrad_cli.training.divergence import Divergence
from sparsegrad_cli.training.evaluation import Evaluator
from sparsegrad_cli.training.loaders import TrainingBatches
from sparsegrad_cli.training.memory_probe import MemoryProbe
from sparsegrad_cli.training.optimizer_steps import OptimizerSteps
from sparsegrad_cli.training.outcome import note_extension, optimizer_block, record_outcome
from sparsegrad_cli.training.samples import SamplePrompts
from sparsegrad_cli.training.schedule import StepPlan
from sparsegrad_cli.training.step_log import StepLog
from sparsegrad_cli.training.token_counter import TokenCounter
from sparsegrad_cli.training.tracking import make_trackers, tracked

if TYPE_CHECKING:
    from sparsegrad_cli.run.open_run import Run

_DURATIONS_KEPT = 10_000  # In a checkpoint.


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
        self._began = time.perf_counter()
        self._before = Measured()  # Of the run until the checkpoint that it resumes from.
        self.tokens = TokenCounter(setup.unpadding, None)

        setup.model.config.use_cache = False  # type: ignore[union-attr]
        trackers = make_trackers(self.recipe, run.path, setup.model, run.observer.note)
        self.accelerator = make_accelerator(self.train, setup, trackers, run.observer.note)
        self.sharded_by = sharded_by(self.accelerator)
        self.optimizer = method.optimizer(setup.model, self.train)
        self.writer.save(
            split_by=self.sharded_by, optimizer=optimizer_block(self.optimizer, self.train)
        )
        samples = None
        if self.train.sample_prompts is not None:
            samples = SamplePrompts(setup, self.train, sharded=self.sharded_by is not None)
        self.evaluator = Evaluator(
            setup, self.train, self.plan, self.accelerator, self.log, run.observer, samples
        )
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
        self._origins = files.origins(setup, so_far)

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Compute the loss of a batch by itself, outside of a step.

        It is that of a step if the model is in training mode, and else that of an evaluation.
        """
        model = self.setup.model
        with self.accelerator.autocast():
            return self.setup.objective.loss(model, batch, draw=(1, 1) if model.training else None)

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
        with tracked(self.accelerator, run.path, step):
            self._run_from(last, state)
        self.accelerator.free_memory()

    def _run_from(self, last: Path | None, state: CheckpointState | None) -> None:
        """Train from a checkpoint, or from the start without one; record the outcome."""
        run, step = self.open_run, state.progress.step if state else None
        if state is None:
            run.begin_phase("evaluate", "before the first step")
            self.evaluator.evaluate(0)
        note_extension(self, state)
        run.begin_phase("train", self.recipe.method.name)
        self._began = time.perf_counter() - self.evaluator.seconds
        with files.checkpoint_errors(
            last, lambda: self.progress.step > (step or 0) or self.progress.over
        ):
            self._prepare()
            if last is not None and state is not None:
                self._restore(last, state)
            self._train_to_the_end(last)
        run.seconds["train_s"] = self.measured().train_s
        run.begin_phase("evaluate", "best model")
        record_outcome(self)
        if distributed.is_rank_zero():
            self.checkpoints.finish(self.best_checkpoint)

    # --- before the first step

    def _prepare(self) -> None:
        """Seed, and let accelerate wrap or shard what trains."""
        from transformers import set_seed

        set_seed(self.recipe.seed)  # The same dropout, whatever was drawn before.
        setup = self.setup
        if self.train.gradient_checkpointing:
            setup.model.activation_checkpointing_enable()  # type: ignore[operator]
        self.batches = TrainingBatches(setup, self.recipe)
        model, optimizer, self.batches.loader = self.accelerator.prepare(
            setup.model, self.optimizer, self.batches.loader
        )
        sharded = self.sharded_by is not None
        self.steps = OptimizerSteps(
            model,
            optimizer,
            self.accelerator,
            setup.objective,
            self.plan,
            self.order,
            Divergence(setup, self.plan, self.batches, self.checkpoints, self.loss, sharded),
            self.probe,
        )

    def _restore(self, folder: Path, state: CheckpointState) -> None:
        """Continue where a checkpoint was written.

        Raises:
            FileFormatError: The checkpoint is damaged, or of a run that was made of other things.
        """
        files.check_origins(folder, state.origins, self._origins)
        files.load_weights(folder, self.setup.model, self.method)
        files.load_optimizer(folder, self.optimizer, self.steps.scheduler)
        if self.accelerator.scaler is not None and state.scaler:
            self.accelerator.scaler.load_state_dict(state.scaler)
        self.order.load_state(state.order.model_dump())
        if self.plan.max_steps > state.progress.max_steps:
            self.order.forget_last()
        self.progress = state.progress.model_copy(update={"max_steps": self.plan.max_steps})
        self.steps.loss_sum += state.progress.loss_sums[distributed.rank()]
        self._before = state.measured
        self.tokens = TokenCounter(self.setup.unpadding, state.measured.tokens)
        self.log.timer.durations[:0] = state.measured.steps_s
        if state.progress.evaluation_due:
            files.load_random(folder)  # Into the checkpoint that this evaluation may leave.
            self._evaluate_and_save(evaluate=True, save=state.progress.save_due)

    # --- steps

    def _train_to_the_end(self, resumed_from: Path | None) -> None:
        """Take all steps that are left, and end with the best weights if the recipe says so."""
        plan, progress = self.plan, self.progress
        self.open_run.observer.total_steps("train", plan.max_steps, done=progress.step)
        while not progress.over:
            self._stop_if_requested()
            epoch, done = divmod(progress.step, plan.steps_per_epoch)
            if not done and resumed_from is not None:
                files.load_random(resumed_from)
            batches = self.batches.of_epoch(epoch, first_step=done)
            for _ in range(done, plan.steps_per_epoch):
                step_batches = list(islice(batches, self.train.gradient_accumulation_steps))
                # The loader has drawn its seed by now, as it had when the checkpoint was written.
                if done and resumed_from is not None:
                    files.load_random(resumed_from)
                resumed_from = None
                self._take_step(step_batches)
                if progress.over:
                    break
                if not plan.ends_epoch(progress.step):
                    self._stop_if_requested()
        self._stop_if_requested()  # The weights of the last step are replaced by the best ones.
        if plan.keeps_best and self.best_checkpoint is not None:
            files.load_best_weights(self.best_checkpoint, self.setup.model, self.method)

    def _take_step(self, batches: list[dict[str, Tensor]]) -> None:
        """Take one optimizer step; then log, evaluate and save what is due, in this order."""
        step, plan = self.progress.step + 1, self.plan
        last = step == plan.max_steps
        self.log.timer.start()
        with self.tokens.counted(batches):
            self.steps.take(step, batches)
        self.progress.step = step
        self.log.timer.stop()
        self.order.mark(step, last=last)
        self.log.step_done(step)
        if self.probe:
            self.probe.after_step(last=last)
        if plan.logs_after(step):
            self._log_loss()
        self._evaluate_and_save(evaluate=plan.evaluates_after(step), save=plan.saves_after(step))

    def _log_loss(self) -> None:
        """Log the mean training loss over the steps since it was last logged."""
        progress, steps = self.progress, self.steps
        mean = steps.mean_loss(progress.step - progress.logged_step)
        progress.logged_step = progress.step
        epoch, rate = self.plan.epoch_after(progress.step), steps.learning_rate
        self.log.add_loss(
            TrainingLoss(step=progress.step, epoch=round(epoch, 4), loss=mean, learning_rate=rate)
        )
        values = {"loss": mean, "learning_rate": rate, "epoch": epoch}
        if steps.gradient_norm is not None:
            values["grad_norm"] = steps.gradient_norm
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
            fix=f"continue with: sparsegrad train {self.open_run.path} --resume",
        )

    # --- evaluation and checkpoints

    def _evaluate_and_save(self, *, evaluate: bool, save: bool) -> None:
        """Evaluate and save; what is interrupted is due again when the run is resumed."""
        progress, strategy = self.progress, self.plan.save_strategy
        if evaluate:
            progress.evaluation_due, progress.save_due = True, save
            try:
                score = self.evaluator.evaluate(progress.step).score
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
            metric, patience = self.setup.objective.metric, self.train.early_stopping_patience
            improved = progress.count_evaluation(score, metric, patience)
            save = save or (strategy == "best" and improved)
            save = save or (strategy == "epoch" and progress.stopped_early)
        if save:
            self._save_checkpoint()

    def final_evaluation(self) -> Evaluation:
        """Return the evaluation of the last step; make it if the schedule has none there."""
        evaluations, step = self.log.evaluations, self.progress.step
        if evaluations and evaluations[-1].step == step:
            return evaluations[-1]
        return self.evaluator.evaluate(step)

    @contextmanager
    def resumable_end(self) -> Iterator[None]:
        """Leave a checkpoint if the user stops the run inside; check for it once more at the end.

        Raises:
            InterruptedRunError: The user asked to stop.
        """
        try:
            yield
            interruption.raise_if_requested("saving the adapter")
        except InterruptedRunError:
            if not self.plan.keeps_best:  # Or the weights may be those of another step.
                self._save_now()
            raise

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
        self.progress.loss_sums = distributed.all_gather(float(self.steps.loss_sum))
        weights, optimizer = trainable_state(self.setup.model), files.whole_state(self.optimizer)
        scaler = self.accelerator.scaler
        fill = partial(
            files.write_checkpoint,
            state=LoopState(
                progress=self.progress,
                order=OrderState.model_validate(self.order.state()),
                origins=self._origins,
                measured=self.measured(),
                scaler=None if scaler is None else scaler.state_dict(),
            ),
            weights=weights,
            optimizer_state=optimizer,
            scheduler=self.steps.scheduler,
            random_states=random_states,
        )
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

    def measured(self) -> Measured:
        """Return times and memory of the whole run so far."""
        here = time.perf_counter() - self._began - self.evaluator.seconds
        shape = self.probe.batch_shape if self.probe else None
        memory = self.setup.meter.report().changed(batch_shape=shape)
        if "backward" not in memory.phases and self._before.memory:
            memory = self._before.memory  # Measured before the run stopped; that step is past.
        return Measured(
            train_s=self._before.train_s + here,
            steps_s=self.log.timer.durations[-_DURATIONS_KEPT:],
            memory=memory,
            tokens=self.tokens.total,
        )
