"""Answer questions with one model or all models of a comparison. Imports no torch itself."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from sparsegrad_cli.error_mapping import mapped_errors
from sparsegrad_cli.generate.options import GenerateOptions, GenerationSettings, ModelOptions
from sparsegrad_cli.generate.questions import Question, read_questions
from sparsegrad_cli.progress import Observer

if TYPE_CHECKING:
    from sparsegrad_cli.generate.answerer import Answerer
    from sparsegrad_cli.records.answers import AnswersRecord


def generation_errors() -> AbstractContextManager[None]:
    """Turn Ctrl-C and failed allocations into errors that name this command's settings."""
    return mapped_errors(
        again="the same command continues where it stopped",
        memory=("--batch-size", "a smaller batch, fewer --max-new-tokens, or --device cpu"),
    )


def answer(options: GenerateOptions, observer: Observer | None = None) -> dict[str, Any]:
    """Answer questions with one model.

    Returns:
        See :func:`sparsegrad_cli.generate.answer_questions.answer_questions`.

    Raises:
        SparsegradError: The call failed; answers so far are kept.
    """
    questions, observer = _questions(options), observer or Observer()
    with generation_errors():
        from sparsegrad_cli.generate.answer_questions import answer_questions

        answerer, about = load_answerer(options.model, options.settings, observer)
        return answer_questions(answerer, about, questions, options, observer)


def answer_with_study(options: GenerateOptions, observer: Observer | None = None) -> AnswersRecord:
    """Answer questions with all models of a comparison.

    Returns:
        See :func:`sparsegrad_cli.generate.answer_study.answer_study`.

    Raises:
        SparsegradError: The call failed; answers so far are kept.
    """
    questions = _questions(options)
    with generation_errors():
        from sparsegrad_cli.generate.answer_study import answer_study

        return answer_study(options, questions, observer or Observer())


def load_answerer(
    model: ModelOptions, settings: GenerationSettings, observer: Observer
) -> tuple[Answerer, dict[str, Any]]:
    """Load a model, and return it with its description for records.

    Raises:
        SparsegradError: It cannot be loaded, see :func:`load_chat_model`.
    """
    from sparsegrad_cli.generate.answerer import Answerer
    from sparsegrad_cli.generate.load_chat_model import load_chat_model

    observer.phase("load", model.source)
    loaded, tokenizer, about = load_chat_model(model)
    if about.get("source") not in (None, "adapter"):
        observer.note(f"the run has no adapter yet: {about['source']} is used")
    return Answerer(loaded, tokenizer, settings), about


def _questions(options: GenerateOptions) -> list[Question]:
    if options.prompt is not None:
        return [Question(1, None, (options.prompt,))]
    return read_questions(options.questions or "")
