"""Evaluation of a run's model on its validation splits, over all processes."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from accelerate import Accelerator

from sparsegrad_cli import distributed
from sparsegrad_cli.progress import Observer
from sparsegrad_cli.recipe.schema import TrainSection
from sparsegrad_cli.records.run import Evaluation, SampleAnswer
from sparsegrad_cli.tasks.objective import Judgement, ValidationBatch
from sparsegrad_cli.tasks.setup import Setup
from sparsegrad_cli.training.loaders import validation_batches
from sparsegrad_cli.training.samples import SamplePrompts
from sparsegrad_cli.training.schedule import StepPlan
from sparsegrad_cli.training.step_log import StepLog


class Evaluator:
    """Evaluate the model of a run, and log the result.

    Attributes:
        seconds: Wall time of all evaluations so far.
        notes: Remarks of the metrics, such as undefined correlations, each once.
    """

    def __init__(
        self,
        setup: Setup,
        train: TrainSection,
        plan: StepPlan,
        accelerator: Accelerator,
        log: StepLog,
        observer: Observer,
        samples: SamplePrompts | None = None,
    ) -> None:
        self._setup, self._train, self._plan = setup, train, plan
        self._accelerator, self._log, self._observer = accelerator, log, observer
        self._samples = samples
        self.seconds = 0.0
        self.notes: list[str] = []
        self._batches = 0  # Of this evaluation that are done.

    def evaluate(self, step: int) -> Evaluation:
        """Evaluate the model after ``step`` on all splits. All processes have to call it.

        Raises:
            InterruptedRunError: The user asked to stop; between two batches.
        """
        started = time.perf_counter()
        metric, epoch = self._setup.objective.metric, self._plan.epoch_after(step)
        judgements = self.judge_splits()
        first = next(iter(judgements.values()))  # The one that selects the best model.
        evaluation = Evaluation(
            step=step,
            epoch=epoch,
            metric=metric,
            score=first.values[metric],
            loss=first.loss,
            values={name: dict(judged.values) for name, judged in judgements.items()},
        )
        if first.threshold is not None:
            evaluation = evaluation.changed(threshold=first.threshold)
        if self._samples is not None:
            evaluation = evaluation.changed(samples=self._answers(self._samples))
        for note in dict.fromkeys(note for each in judgements.values() for note in each.notes):
            if (text := f"step {step}: {note}") not in self.notes:
                self.notes.append(text)
        self.seconds += time.perf_counter() - started
        self._log.add_evaluation(evaluation)
        flat = {"eval_score": evaluation.score, "eval_loss": evaluation.loss, "epoch": epoch}
        for name, judged in judgements.items():
            flat |= {f"eval_{name}_{key}": value for key, value in judged.values.items()}
        self._accelerator.log(flat, step=step)
        return evaluation

    def judge_splits(self) -> dict[str, Judgement]:
        """Judge the model on every split.

        memory/out_of_memory.py finds this method by its name in a traceback.
        """
        setup, model = self._setup, self._setup.model
        was_training = model.training
        model.eval()
        size = self._train.per_device_eval_batch_size * distributed.world_size()
        batches = sum(-(-len(data) // size) for data in setup.validation.values())
        self._observer.total_steps("evaluate", batches, unit="batches")
        self._batches = 0
        try:
            with torch.no_grad(), self._accelerator.autocast():
                return {
                    name: setup.objective.judge(
                        model,
                        self._counted(
                            validation_batches(
                                data,
                                setup.collator,
                                batch_size=self._train.per_device_eval_batch_size,
                                device=setup.device,
                                workers=self._train.dataloader_num_workers,
                            )
                        ),
                    )
                    for name, data in setup.validation.items()
                }
        finally:
            model.train(was_training)

    def _answers(self, samples: SamplePrompts) -> list[SampleAnswer]:
        model = self._setup.model
        was_training = model.training
        model.eval()
        try:
            with self._accelerator.autocast():
                return samples.answers(self._observer)
        finally:
            model.train(was_training)

    def _counted(self, batches: Iterator[ValidationBatch]) -> Iterator[ValidationBatch]:
        """Yield the batches of a split, and report each one that is done."""
        for batch in batches:
            yield batch
            self._batches += 1
            self._observer.step("evaluate", {"step": self._batches})
