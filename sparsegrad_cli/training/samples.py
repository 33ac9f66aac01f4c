"""Answers to sample prompts during training, which show how a chat model changes."""

from __future__ import annotations

from sparsegrad_cli import distributed
from sparsegrad_cli.data.conversation import Turn
from sparsegrad_cli.data.questions import read_prompts
from sparsegrad_cli.progress import Observer
from sparsegrad_cli.recipe.schema import TrainSection
from sparsegrad_cli.records.run import SampleAnswer
from sparsegrad_cli.tasks.answerer import Answer, Answerer
from sparsegrad_cli.tasks.generation_settings import GenerationSettings
from sparsegrad_cli.tasks.setup import Setup


class SamplePrompts:
    """Let the model answer the prompts of a recipe, without a trace in the training run.

    Weights, modes and random states stay as they are. Rank zero answers alone, unless weights are
    sharded, which needs every process.

    Args:
        setup: Model and tokenizer.
        train: The settings.
        sharded: Whether each process holds a part of the weights.

    Raises:
        UsageError: The file of prompts or the chat template cannot be used.
    """

    def __init__(self, setup: Setup, train: TrainSection, *, sharded: bool) -> None:
        assert train.sample_prompts is not None
        self._prompts = read_prompts(train.sample_prompts)
        settings = GenerationSettings(
            max_new_tokens=train.sample_max_new_tokens, temperature=train.sample_temperature
        )
        training = setup.model.training
        self._answerer = Answerer(setup.model, setup.tokenizer, settings)
        setup.model.train(training)  # Answerer sets evaluation mode.
        self._batch_size = train.per_device_eval_batch_size
        self._takes_part = sharded or distributed.is_rank_zero()

    def answers(self, observer: Observer) -> list[SampleAnswer]:
        """Return the answers of the model, which is in evaluation mode.

        Args:
            observer: Told of each batch of answers.

        Returns:
            One answer per prompt, in order; in a process that takes no part, none.
        """
        if not self._takes_part:
            return []
        found: list[SampleAnswer] = []
        observer.total_steps("samples", len(self._prompts), unit="answers")
        for start in range(0, len(self._prompts), self._batch_size):
            prompts = self._prompts[start : start + self._batch_size]
            turns = [[Turn("user", prompt)] for prompt in prompts]
            answers = self._answerer.answer(turns, str(start))
            found += [_sample(p, answer) for p, answer in zip(prompts, answers, strict=True)]
            observer.step("samples", {"step": len(found)})
        return found


def _sample(prompt: str, answer: Answer) -> SampleAnswer:
    return SampleAnswer(
        prompt=prompt, answer=answer.text, tokens=answer.tokens, stopped=answer.stopped
    )
