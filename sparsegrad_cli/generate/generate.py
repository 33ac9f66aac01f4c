"""Answer questions with a model, or load a model for a conversation. Imports no torch itself."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from sparsegrad_cli.error_mapping import mapped_errors
from sparsegrad_cli.generate.options import GenerateOptions, GenerationSettings, ModelOptions
from sparsegrad_cli.progress import Observer

if TYPE_CHECKING:
    from sparsegrad_cli.generate.answerer import Answerer


def generation_errors() -> AbstractContextManager[None]:
    """Map Ctrl-C and failed allocations inside, with the settings of this command."""
    return mapped_errors(
        again="the same command continues where it stopped",
        memory=("--batch-size", "a smaller batch, fewer --max-new-tokens, or --device cpu"),
    )


def generate(options: GenerateOptions, observer: Observer | None = None) -> dict[str, Any]:
    """Answer questions into a file that a later call continues.

    Returns:
        The model, the settings, what was asked and kept, and ``answers``, one line per question.
        For a comparison, whose models all answer: the content of answers/<questions>.json.

    Raises:
        SparsegradError: of the kind that fits what happened; the answers so far are kept.
    """
    from sparsegrad_cli.generate.questions import Question, read_questions
    from sparsegrad_cli.generate.side_by_side import is_study

    observer = observer or Observer()
    if options.prompt is not None:
        questions = [Question(1, None, (options.prompt,))]
    else:
        questions = read_questions(options.questions or "")
    with generation_errors():
        if is_study(options.model.source):
            from sparsegrad_cli.generate.answer_study import answer_study

            return answer_study(options, questions, observer)
        from sparsegrad_cli.generate.answer_questions import answer_questions

        answerer, about = load_answerer(options.model, options.settings, observer)
        return answer_questions(answerer, about, questions, options, observer)


def load_answerer(
    model: ModelOptions, settings: GenerationSettings, observer: Observer
) -> tuple[Answerer, dict[str, Any]]:
    """Load a model that answers, and what the record says of it.

    Raises:
        SparsegradError: of the kind that fits what happened.
    """
    from sparsegrad_cli.generate.answerer import Answerer
    from sparsegrad_cli.generate.load_chat_model import load_run

    observer.phase("load", model.source)
    loaded, tokenizer, about = load_run(model)
    if about.get("source") not in (None, "adapter"):
        observer.note(f"the run left no adapter yet: {about['source']} answers")
    return Answerer(loaded, tokenizer, settings), about
