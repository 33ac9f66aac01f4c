"""Evaluation of a run's model on its validation and test sets, over all processes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

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
        judgements = self.judge_splits(self._setup.validation)
        evaluation = self._evaluation(step, judgements, f"step {step}")
        if self._samples is not None:
            evaluation = evaluation.changed(samples=self._answers(self._samples))
        self.seconds += time.perf_counter() - started
        self._log.add_evaluation(evaluation)
        epoch = evaluation.epoch
        flat = {"eval_score": evaluation.score, "eval_loss": evaluation.loss, "epoch": epoch}
        for name, judged in judgements.items():
            flat |= {f"eval_{name}_{key}": value for key, value in judged.values.items()}
        self._accelerator.log(flat, step=step)
        return evaluation

    def test(self, kept: Evaluation) -> tuple[Evaluation, dict[str, Judgement]]:
        """Measure the kept model on the test sets. All processes have to call it.

        Args:
            kept: The evaluation that chose the model. Its threshold is used, if it has one.

        Raises:
            InterruptedRunError: The user asked to stop; between two batches.
        """
        started = time.perf_counter()
        judgements = self.judge_splits(self._setup.test, kept.threshold)
        found = self._evaluation(kept.step, judgements, "test")
        self.seconds += time.perf_counter() - started
        self._accelerator.log({"test_score": found.score, "test_loss": found.loss}, step=kept.step)
        return found, judgements

    def _evaluation(self, step: int, judgements: Mapping[str, Judgement], when: str) -> Evaluation:
        """Return the record of judgements, with the score of the first; keep their notes."""
        metric, first = self._setup.objective.metric, next(iter(judgements.values()))
        evaluation = Evaluation(
            step=step,
            epoch=self._plan.epoch_after(step),
            metric=metric,
            score=first.values[metric],
            loss=first.loss,
            values={name: dict(judged.values) for name, judged in judgements.items()},
        )
        if first.threshold is not None:
            evaluation = evaluation.changed(threshold=first.threshold)
        for note in dict.fromkeys(note for each in judgements.values() for note in each.notes):
            if (text := f"{when}: {note}") not in self.notes:
                self.notes.append(text)
        return evaluation

    def judge_splits(
        self, sets: Mapping[str, Any], threshold: float | None = None
    ) -> dict[str, Judgement]:
        """Judge the model on every set; see :meth:`.Objective.judge`.

        memory/out_of_memory.py finds this method by its name in a traceback.
        """
        setup, model = self._setup, self._setup.model
        was_training = model.training
        model.eval()
        size = self._train.per_device_eval_batch_size * distributed.world_size()
        batches = sum(-(-len(data) // size) for data in sets.values())
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
                        threshold,
                    )
                    for name, data in sets.items()
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
