"""What a training run records when it begins and when it ends, beside its steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from sparsegrad_cli import distributed, interruption
from sparsegrad_cli.io.paths import remove_folder
from sparsegrad_cli.recipe.schema import TrainSection
from sparsegrad_cli.records.metric_direction import scale_of
from sparsegrad_cli.records.run import (
    Evaluation,
    HashesBlock,
    MetricsBlock,
    OptimizerBlock,
    ParameterGroup,
    SizesBlock,
    TimeBlock,
)
from sparsegrad_cli.restore.adapter_folder import save_adapter
from sparsegrad_cli.run.checkpoint_state import CheckpointState
from sparsegrad_cli.run.folder import ADAPTER
from sparsegrad_cli.run.test_answers import Answer, write_answers
from sparsegrad_cli.tasks.objective import Judgement
from sparsegrad_cli.training.accelerator import gradient_bytes
from sparsegrad_cli.training.sparsity_stats import sparsity_map, with_touched

if TYPE_CHECKING:
    from sparsegrad_cli.training.loop import TrainingLoop

# Learning-rate schedules that do not depend on the number of steps.
_WITHOUT_END = ("constant", "constant_with_warmup", "inverse_sqrt")


def optimizer_block(optimizer: torch.optim.Optimizer, train: TrainSection) -> OptimizerBlock:
    """Return the record of an optimizer, before its first step."""
    groups = [
        ParameterGroup(
            parameters=sum(parameter.numel() for parameter in group["params"]),
            learning_rate=group["lr"],
            weight_decay=group.get("weight_decay"),
        )
        for group in optimizer.param_groups
    ]
    return OptimizerBlock(name=train.optim, type=type(optimizer).__name__, groups=groups)


def note_extension(loop: TrainingLoop, state: CheckpointState | None) -> None:
    """Record what becomes of the learning rates of an extended run, and remove its old adapter.

    Args:
        loop: Before its first step.
        state: Of the checkpoint that it continues from, if there is one.
    """
    extended = loop.writer.record.extended
    if not extended or extended[-1].schedule is not None:
        return
    kind, total = loop.train.lr_scheduler_type, loop.plan.max_steps
    if state is None:
        words = "no checkpoint is left: training starts again from step 0"
    else:
        progress = state.progress
        checkpoint = f"checkpoint-{progress.step}"
        words = f"extended from {progress.max_steps} to {total} steps, from {checkpoint}"
        if kind in _WITHOUT_END and not 0 < loop.train.warmup_steps < 1:
            words += f": lr_scheduler_type {kind} is the same for any length"
        else:
            words += (
                f": lr_scheduler_type {kind} is recomputed over {total} steps; a run of {total} "
                f"steps from the start has other learning rates before {checkpoint}"
            )
        if progress.stopped_early:
            words += f". Early stopping ended it at step {progress.step}: it stays ended"
    latest = extended[-1].changed(steps=total, schedule=words)
    loop.writer.save(extended=[*extended[:-1], latest])
    loop.open_run.observer.note(words)
    if distributed.is_rank_zero():
        remove_folder(loop.writer.path / ADAPTER.parent)


def record_outcome(loop: TrainingLoop) -> None:
    """Evaluate the final weights if that is left to do, save the adapter and fill the record."""
    setup, writer = loop.setup, loop.writer
    counts = writer.record.counts
    assert counts is not None  # Recorded when the method prepared the model.
    writer.save(
        counts=with_touched(counts, loop.prepared.counts, setup.model, loop.optimizer),
        sparsity=sparsity_map(setup.targets, setup.model, loop.method, loop.optimizer),
    )
    with loop.resumable_end():
        final = loop.final_evaluation()
        history = loop.log.evaluations
        best = _best(history, loop) if loop.plan.keeps_best else final
        test = _test(loop, best) if setup.test else None
    interruption.set_phase("writing the adapter and the report", finishing=True)
    loop.open_run.seconds["evaluate_s"] = loop.evaluator.seconds
    _save_adapter(loop)
    setup.meter.watch(setup.model)  # Looks again: bounded optimizer state has grown.
    timing = loop.log.timer.summary()
    examples = loop.train.per_device_train_batch_size * loop.train.gradient_accumulation_steps
    sizes = writer.record.sizes or SizesBlock()
    hashes = writer.record.hashes or HashesBlock()
    writer.save(
        metrics=MetricsBlock(
            initial=_without_samples(next((each for each in history if each.step == 0), None)),
            best=_without_samples(best),
            final=_without_samples(final),
            test=test,
            history=history,
            train=loop.log.losses,
            notes=loop.evaluator.notes,
        ),
        memory=loop.measured().memory,
        tokens=loop.tokens.total,
        time=TimeBlock(
            steps=loop.progress.step,
            examples_per_s=timing["steps_per_s"] * examples * distributed.world_size(),
            **timing,
            **loop.open_run.seconds,
        ),
        sizes=sizes.changed(optimizer_state_bytes=setup.meter.live()["optimizer_state"]),
        hashes=hashes.changed(order=loop.order.kept, rows=loop.order.kept_rows),
    )


def _test(loop: TrainingLoop, kept: Evaluation) -> Evaluation:
    """Measure the kept model on the test sets, and write its answers to test.csv."""
    loop.open_run.begin_phase("evaluate", "test")
    found, judgements = loop.evaluator.test(kept)
    if distributed.is_rank_zero():
        answers = ((name, _answers(judged)) for name, judged in judgements.items())
        write_answers(loop.writer.path, answers)
    return found


def _answers(judged: Judgement) -> list[Answer]:
    """Return label and prediction of every row."""
    logits, labels = judged.logits, judged.labels
    assert logits is not None and labels is not None  # A task with a holdout has texts with labels.
    if judged.threshold is not None:
        from scipy.special import expit

        given_NL = expit(logits.astype(np.float64)) >= judged.threshold
        return [
            Answer(tuple(np.flatnonzero(true).tolist()), tuple(np.flatnonzero(given).tolist()))
            for true, given in zip(labels, given_NL, strict=True)
        ]
    predictions = logits.argmax(axis=1) if labels.dtype.kind == "i" else logits.reshape(-1)
    return [Answer(*pair) for pair in zip(labels.tolist(), predictions.tolist(), strict=True)]


def _best(history: list[Evaluation], loop: TrainingLoop) -> Evaluation:
    """Return the best evaluation after the first step, which is the first one of its score."""
    trained = [e for e in history if e.step > 0] or history
    scores = [e.score for e in trained if e.score is not None]
    chosen = scale_of(loop.setup.objective.metric).best(scores)
    return next(e for e in trained if e.score == chosen)


def _without_samples(evaluation: Evaluation | None) -> Evaluation | None:
    """Return an evaluation without its answers, which the history holds."""
    if evaluation is None or not evaluation.samples:
        return evaluation
    return Evaluation.model_validate(evaluation.model_dump(exclude={"samples"}))


def _save_adapter(loop: TrainingLoop) -> None:
    writer = loop.writer
    about = {"method": loop.method.settings.name, "recipe_digest": str(writer.record.recipe_digest)}
    path = save_adapter(writer.path, loop.method, loop.setup, loop.recipe.model, loop.drawn, about)
    if distributed.is_rank_zero():
        sent = gradient_bytes(loop.setup.model, loop.accelerator)
        writer.save(
            sizes=SizesBlock(adapter_bytes=path.stat().st_size, gradient_bytes_per_step=sent)
        )
