"""Export, generate, judge, estimate and solve, with their errors mapped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsegrad_cli.error_mapping import mapped_errors
from sparsegrad_cli.errors import InterruptedRunError
from sparsegrad_cli.progress import Observer
from sparsegrad_cli.recipe.load_recipe import LoadedRecipe

if TYPE_CHECKING:
    from sparsegrad_cli.estimate.estimate_steps import Room
    from sparsegrad_cli.estimate.rehearsal import Conditions, Kernels
    from sparsegrad_cli.export.options import ExportOptions
    from sparsegrad_cli.generate.answerer import Answerer
    from sparsegrad_cli.generate.options import (
        GenerateOptions,
        GenerationSettings,
        ModelOptions,
    )
    from sparsegrad_cli.judge.judge_answers import JudgeOptions
    from sparsegrad_cli.recipe.study import LoadedStudy


def export(
    run: Path,
    options: ExportOptions,
    observer: Observer | None = None,
    *,
    overrides: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Write a run's model in a form that runs elsewhere, and check that it answers alike.

    Returns:
        The content of export.json, with ``output_dir``.

    Raises:
        SparsegradError: of the kind that says what happened; nothing is left of the attempt.
    """
    from sparsegrad_cli.export.export_run import export_run

    observer = observer or Observer()
    try:
        with mapped_errors(
            again="run the same command again",
            memory=("--check-examples", "fewer examples, or train.use_cpu=true"),
        ):
            return export_run(run, overrides, options, observer)
    finally:
        observer.close()


def generate(options: GenerateOptions, observer: Observer | None = None) -> dict[str, Any]:
    """Have a model answer questions, into a file that a later call goes on with.

    Returns:
        The model, the settings, what was asked and kept, and ``answers``, a line a question. Of a
        comparison, whose models all answer: the content of answers/<questions>.json.

    Raises:
        SparsegradError: of the kind that says what happened; answers so far are kept.
    """
    from sparsegrad_cli.generate.questions import Question, read_questions
    from sparsegrad_cli.generate.side_by_side import is_study

    observer = observer or Observer()
    if options.prompt is not None:
        questions = [Question(1, None, (options.prompt,))]
    else:
        questions = read_questions(options.questions or "")
    try:
        with _generating():
            if is_study(options.model.source):
                from sparsegrad_cli.generate.answer_study import answer_study

                return answer_study(options, questions, observer)
            from sparsegrad_cli.generate.answer_questions import answer_questions

            answerer, about = _answerer(options.model, options.settings, observer)
            return answer_questions(answerer, about, questions, options, observer)
    finally:
        observer.close()


def converse(
    model: ModelOptions,
    settings: GenerationSettings,
    talk: Callable[[Answerer, dict[str, Any]], None],
    observer: Observer | None = None,
) -> None:
    """Load a model and hand it to a conversation.

    Args:
        talk: called with what answers, and the model's record, once the observer is closed.

    Raises:
        SparsegradError: of the kind that says what happened.
    """
    observer = observer or Observer()
    with _generating():
        try:
            answerer, about = _answerer(model, settings, observer)
            for note in answerer.notes:
                observer.note(note)
        finally:
            observer.close()
        talk(answerer, about)


def _answerer(
    model: ModelOptions, settings: GenerationSettings, observer: Observer
) -> tuple[Answerer, dict[str, Any]]:
    from sparsegrad_cli.generate.answerer import Answerer
    from sparsegrad_cli.generate.load_chat_model import load_run

    observer.phase("load", model.source)
    loaded, tokenizer, about = load_run(model)
    if about.get("source") not in (None, "adapter"):
        observer.note(f"the run left no adapter yet: {about['source']} answers")
    return Answerer(loaded, tokenizer, settings), about


def _generating() -> AbstractContextManager[None]:
    return mapped_errors(
        again="the same command goes on where it stopped",
        memory=("--batch-size", "a smaller batch, fewer --max-new-tokens, or --device cpu"),
    )


def estimate(
    cells: Sequence[tuple[str, LoadedRecipe]],
    conditions: Conditions,
    room: Room | None = None,
    observer: Observer | None = None,
) -> dict[str, Any]:
    """What a training step of each recipe will need; see :func:`estimate_steps`.

    Args:
        cells: label and recipe of every row.
        conditions: what is supposed beside the recipes.
        room: also find the largest batch that fits there.

    Raises:
        SparsegradError: of the kind that says what happened.
    """
    from sparsegrad_cli.estimate.estimate_steps import estimate_steps

    observer = observer or Observer()
    try:
        with mapped_errors(
            again="run the same command again",
            memory=("estimate", "fewer methods at a time: shapes alone take a few hundred MiB"),
        ):
            return estimate_steps(cells, conditions, room, observer)
    finally:
        observer.close()


def solve(
    study: LoadedStudy,
    observer: Observer | None = None,
    *,
    kept: Mapping[str, Any] | None = None,
    kernels: Kernels | None = None,
) -> LoadedStudy:
    """A study with every method at the size that its budget allows; see :func:`solve_study`.

    Raises:
        SparsegradError: of the kind that says what happened.
    """
    if study.study.budget is None:
        return study
    from sparsegrad_cli.study.budget.solve_study import solve_study

    observer = observer or Observer()
    try:
        with mapped_errors(
            again="run the same command again",
            memory=("match", "a method at a time: shapes alone take a few hundred MiB"),
        ):
            return solve_study(study, kept=kept, kernels=kernels, observer=observer)
    finally:
        observer.close()


def judge(options: JudgeOptions, observer: Observer | None = None) -> dict[str, Any]:
    """Have answers graded, or compared, by a language model behind an endpoint. Needs no torch.

    Returns:
        The content of judge.json; ``status`` is failed if a request failed for good.

    Raises:
        SparsegradError: of the kind that says what happened; verdicts so far are kept.
    """
    from sparsegrad_cli.judge.judge_answers import judge_answers

    observer = observer or Observer()
    try:
        return judge_answers(options, observer)
    except KeyboardInterrupt:
        raise InterruptedRunError(
            "stopped by the user", fix="the same command goes on where it stopped"
        ) from None
    finally:
        observer.close()
