"""The options of ``sparsegrad generate``, and its errors. Imports no torch."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from sparsegrad_cli.data.questions import Question, read_questions
from sparsegrad_cli.error_mapping import mapped_errors
from sparsegrad_cli.tasks.generation_settings import GenerationSettings


@dataclass(frozen=True)
class ModelOptions:
    """The model that answers.

    Attributes:
        source: A run's folder, an exported folder, a model's folder, a hub id or a built-in.
        overrides: For a run: ``key.path=value`` for files that have moved since.
        device: A device of torch; None uses a GPU if there is one.
        dtype: The dtype of the weights; None uses that of the model's files. A run has its own.
    """

    source: str
    overrides: tuple[str, ...] = ()
    device: str | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class GenerateOptions:
    """The options of one call with questions.

    Attributes:
        model: The model that answers.
        settings: How it answers.
        questions: See :func:`sparsegrad_cli.data.questions.read_questions`; None with
            ``prompt``.
        prompt: A single question.
        batch_size: Questions per batch.
        output: File to which answers are added. With None, answers to a prompt are not written, and
            others are written to runs/answers/.
    """

    model: ModelOptions
    settings: GenerationSettings
    questions: str | None = None
    prompt: str | None = None
    batch_size: int = 4
    output: Path | None = None

    def read_questions(self) -> list[Question]:
        """Return the prompt, or the questions of the file; see :func:`read_questions`."""
        if self.prompt is not None:
            return [Question(1, None, (self.prompt,))]
        return read_questions(self.questions or "")


def generation_errors() -> AbstractContextManager[None]:
    """Turn Ctrl-C and failed allocations into errors that name this command's settings."""
    return mapped_errors(
        again="the same command continues where it stopped",
        memory=("--batch-size", "a smaller batch, fewer --max-new-tokens, or --device cpu"),
    )
