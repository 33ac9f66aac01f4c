"""Answer the same questions with every finished chat run of a comparison and its base models.

One model is in memory at a time. Answers are stored in the run's folder, and a run that has
answered all questions is not loaded. The record of all answers (generate/answer_files.py) is
written after every model.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sparsegrad_cli.data.questions import Question, questions_name
from sparsegrad_cli.errors import (
    DataError,
    DownloadError,
    FileFormatError,
    RecipeError,
    SparsegradError,
    UsageError,
)
from sparsegrad_cli.generate.answer_files import FOLDER, check_line, side_by_side_file
from sparsegrad_cli.generate.answer_questions import (
    Line,
    answer_questions,
    answers_to,
    default_output,
)
from sparsegrad_cli.generate.load_chat_model import ChatModel, load_base, load_chat_model
from sparsegrad_cli.generate.options import GenerateOptions
from sparsegrad_cli.io.jsonl import read_records
from sparsegrad_cli.io.paths import expanded, file_digest, refuse_link
from sparsegrad_cli.progress import Observer
from sparsegrad_cli.recipe.schema import ModelSection
from sparsegrad_cli.records.answers import AnswersColumn, AnswersRecord
from sparsegrad_cli.records.base import now
from sparsegrad_cli.records.store import error_block, load_study, write
from sparsegrad_cli.records.study import CellEntry
from sparsegrad_cli.restore.run_files import RunFiles, open_run
from sparsegrad_cli.tasks.answerer import Answerer

# Errors that concern one model, so that the others can still be asked.
_ONE_MODEL = (UsageError, DataError, FileFormatError, DownloadError)


@dataclass
class _Asked:
    """A model that is asked: a run of the comparison, or a base model of some of its runs.

    Attributes:
        column: The model's part of the record.
        load: Loads the model.
        output: The file with its answers.
        files: For a run, its files.
        error: The reason if it cannot be asked.
    """

    column: AnswersColumn
    load: Callable[[], ChatModel]
    output: Path
    files: RunFiles | None = None
    error: SparsegradError | None = None

    @property
    def label(self) -> str:
        """Its name in notes."""
        return self.column.run_dir or f"base model {self.column.model}"

    def fail(self, error: SparsegradError, observer: Observer) -> None:
        """Record an error without its stack frames, which would keep the model in memory."""
        error.__traceback__ = error.__cause__ = error.__context__ = None
        self.error = error
        what = "; ".join(error.lines) if isinstance(error, RecipeError) else error.what
        self.column = self.column.changed(
            status="failed", error=error_block(error).changed(what=what)
        )
        observer.note(f"{self.label}: {what}")


def answer_study(
    options: GenerateOptions, questions: Sequence[Question], observer: Observer
) -> AnswersRecord:
    """Answer the missing questions with every model.

    Args:
        options: ``model.source`` is the comparison's folder.
        questions: The questions, in order.
        observer: Receives progress and notes.

    Returns:
        The content of ``answers/<questions>.json`` with ``output``, its path; for a single prompt
        no file is written. ``status`` is failed if one of the models could not be asked.

    Raises:
        UsageError: The folder is not a comparison, or has no finished run of a chat task.
        SparsegradError: No model could be asked (with the error of the first), or the disk is full.
    """
    study = expanded(options.model.source)
    refuse_link(study / FOLDER, study)
    path = None if options.prompt is not None else side_by_side_file(study, options.questions or "")
    asked = _models(study, options, observer)
    status, finished = "running", None

    def record() -> AnswersRecord:
        return AnswersRecord.model_validate(
            {
                "status": status,
                "questions": options.questions,
                "settings": options.settings.record(),
                "asked": [_about(question) for question in questions],
                "columns": [one.column for one in asked],
                "finished": finished,
            }
        )

    def save() -> None:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(record(), path)

    try:
        for one in asked:
            if one.error is None:
                _ask(one, options, questions, observer, study)
            save()
    except BaseException:
        status = "interrupted"
        save()
        raise
    errors = [one.error for one in asked if one.error is not None]
    status, finished = "failed" if errors else "done", now()
    save()
    if len(errors) == len(asked):
        raise errors[0]
    return record().changed(output=None if path is None else str(path))


def _about(question: Question) -> dict[str, Any]:
    return {
        "question_id": question.id,
        "category": question.category,
        "turns": list(question.turns),
        "reference": list(question.reference),
    }


# --- the models


def _models(study: Path, options: GenerateOptions, observer: Observer) -> list[_Asked]:
    """Return the base models, each once, then the runs in the comparison's order."""
    cells = [cell for cell in load_study(study).cells if _is_chat(cell)]
    done = [cell for cell in cells if cell.status == "done"]
    if not done:
        raise UsageError(
            f"{study} has no finished run of a chat task",
            fix="name a comparison of chat tasks; `sparsegrad compare` finishes the other runs",
        )
    if len(done) < len(cells):
        observer.note(f"{len(cells) - len(done)} of {len(cells)} runs have not finished")
    bases: list[tuple[ModelSection, _Asked]] = []
    runs = []
    for cell in done:
        run = _run(study, cell, options, observer)
        runs.append(run)
        if run.files is None:
            continue
        section = run.files.loaded.recipe.model
        base = next((one for known, one in bases if known == section), None)
        if base is None:
            base = _base(study, section, options)
            bases.append((section, base))
        if cell.task not in base.column.tasks:
            base.column = base.column.changed(tasks=[*base.column.tasks, cell.task])
    return [*(base for _, base in bases), *runs]


def _is_chat(cell: CellEntry) -> bool:
    return cell.run is not None and cell.run.task is not None and cell.run.task.kind == "chat"


def _run(study: Path, cell: CellEntry, options: GenerateOptions, observer: Observer) -> _Asked:
    folder = study / str(cell.run_dir)
    output = folder / FOLDER / f"{questions_name(options.questions or '')}.jsonl"
    column = AnswersColumn(
        task=cell.task,
        method=cell.method,
        seed=cell.seed,
        run_dir=str(cell.run_dir),
        status="pending",
        error=None,
    )
    model = replace(options.model, source=str(folder))
    one = _Asked(column, lambda: load_chat_model(model), output)
    try:
        if not folder.resolve().is_relative_to(study.resolve()):
            raise UsageError(f"{folder} lies outside {study}", where=str(study / "compare.json"))
        refuse_link(output, study)
        one.files = open_run(folder, options.model.overrides, data=False)
        one.column = column.changed(finished=one.files.record.finished)
    except _ONE_MODEL as error:
        one.fail(error, observer)
    return one


def _base(study: Path, section: ModelSection, options: GenerateOptions) -> _Asked:
    name = default_output(section.name, options.questions or "").name
    column = AnswersColumn(
        task=None,
        method=None,
        seed=None,
        tasks=[],
        model=section.name,
        dtype=section.dtype,
        status="pending",
        error=None,
    )
    device = options.model.device
    return _Asked(column, lambda: load_base(section, device), study / FOLDER / name)


# --- asking


def _ask(
    one: _Asked,
    options: GenerateOptions,
    questions: Sequence[Question],
    observer: Observer,
    study: Path,
) -> None:
    """Ask one model and fill its column; errors of this model are recorded there."""
    kept = options.prompt is None
    observer.phase("generate", one.label)
    try:
        lines = _complete_already(one, options, questions) if kept else None
        if lines is not None:
            observer.note(f"all {len(lines)} questions are answered already")
            asked = 0
        else:
            mine = replace(options, output=one.output if kept else None)
            found = _answers(one.load, mine, questions, observer)
            lines, asked = found["answers"], found["asked"]
    except _ONE_MODEL as error:
        one.fail(error, observer)
        return
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    shown = ("question_id", "answers", "stopped", "answer_tokens")
    one.column = one.column.changed(
        **{key: lines[0].get(key) for key in ("model", "digest", "dtype")},
        status="done",
        asked=asked,
        file=str(one.output.relative_to(study)) if kept else None,
        answers=[{key: line.get(key) for key in shown} for line in lines],
    )


def _answers(
    load: Callable[[], ChatModel],
    options: GenerateOptions,
    questions: Sequence[Question],
    observer: Observer,
) -> dict[str, Any]:
    """Load the model and answer; the model is freed when this returns."""
    model, tokenizer, about = load()
    answerer = Answerer(model, tokenizer, options.settings)
    return answer_questions(answerer, about, questions, options, observer)


def _complete_already(
    one: _Asked, options: GenerateOptions, questions: Sequence[Question]
) -> list[Line] | None:
    """Return the lines of a run that has answered all questions in its current state; else None."""
    if one.files is None or not one.output.is_file():
        return None
    records, _ = read_records(one.output)
    for number, line in enumerate(records, start=1):
        check_line(line, f"{one.output}:{number}")
    common = {
        "settings": options.settings.record(),
        "recipe_digest": one.files.record.recipe_digest,
        "trained": file_digest(one.files.tensors),
    }
    ours = [line for line in records if all(line.get(k) == v for k, v in common.items())]
    return answers_to(questions, ours)
