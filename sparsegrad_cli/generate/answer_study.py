"""The same questions to every finished chat run of a comparison, and to the models they began as.

One model is in memory at a time. A run keeps its answers in its own folder; a run whose answers are
all there is not even loaded. The record of all of them (generate/side_by_side.py) is written after
every model, so that it is never missing.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sparsegrad_cli.errors import (
    DataError,
    DownloadError,
    FileFormatError,
    RecipeError,
    SparsegradError,
    UsageError,
)
from sparsegrad_cli.export.run_files import RunFiles, open_run
from sparsegrad_cli.generate.answer_questions import answer_questions, answers_to, default_output
from sparsegrad_cli.generate.answerer import Answerer
from sparsegrad_cli.generate.load_chat_model import file_digest, load_base, load_run
from sparsegrad_cli.generate.options import GenerateOptions
from sparsegrad_cli.generate.questions import Question, questions_name
from sparsegrad_cli.generate.side_by_side import FOLDER, SCHEMA, side_by_side_file
from sparsegrad_cli.io.jsonl import read_records
from sparsegrad_cli.io.paths import expanded, refuse_link
from sparsegrad_cli.progress import Observer
from sparsegrad_cli.recipe.schema import ModelSection
from sparsegrad_cli.records.base import now
from sparsegrad_cli.records.store import load_record, write_json_atomic
from sparsegrad_cli.report.access import dig, mappings, text

# Of one model only: the others can still be asked.
_ITS_OWN = (UsageError, DataError, FileFormatError, DownloadError)
_Load = Callable[[], tuple[Any, Any, dict[str, Any]]]


@dataclass
class _Asked:
    """Who is asked: a run of the comparison, or a model that some of its runs began as.

    Attributes:
        column: what the record says of it.
        load: gives model, tokenizer and the model's record.
        output: its file of answers.
        files: of a run.
        error: why it could not be asked.
    """

    column: dict[str, Any]
    load: _Load
    output: Path
    files: RunFiles | None = None
    error: SparsegradError | None = None

    def fail(self, error: SparsegradError) -> None:
        """Note why; without the error's frames, which would keep a model in memory."""
        error.__traceback__ = error.__cause__ = error.__context__ = None
        self.error = error
        what = "; ".join(error.lines) if isinstance(error, RecipeError) else error.what
        problem = {"title": error.title, "what": what, "where": error.where, "fix": error.fix}
        self.column |= {"status": "failed", "error": problem}

    @property
    def why(self) -> str:
        """What went wrong, in a line."""
        return str(self.column["error"]["what"]) if self.error else ""


def answer_study(
    options: GenerateOptions, questions: Sequence[Question], observer: Observer
) -> dict[str, Any]:
    """Have all of them answer what they have not answered yet.

    Returns:
        What ``answers/<questions>.json`` holds (of a single prompt nothing is kept), with
        ``output``, its path. ``status`` is failed if one of the models could not be asked.

    Raises:
        UsageError: no comparison, or none of its chat runs is done.
        SparsegradError: none of the models could be asked, with the reason of the first; or the
            disk is full.
    """
    study = expanded(options.model.source)
    refuse_link(study / FOLDER, study)
    path = None if options.prompt is not None else side_by_side_file(study, options.questions or "")
    asked = _who(study, options, observer)
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "status": "running",
        "questions": options.questions,
        "settings": options.settings.record(),
        "asked": [_about(question) for question in questions],
        "columns": [one.column for one in asked],
        "finished": None,
    }
    try:
        for one in asked:
            if one.error is None:
                _ask(one, options, questions, observer, study)
            _save(path, record)
    except BaseException:
        record["status"] = "interrupted"
        _save(path, record)
        raise
    errors = [one.error for one in asked if one.error is not None]
    record |= {"status": "failed" if errors else "done", "finished": now()}
    _save(path, record)
    if len(errors) == len(asked):
        raise errors[0]
    return {**record, "output": None if path is None else str(path)}


def _save(path: Path | None, record: dict[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(path, record)


def _about(question: Question) -> dict[str, Any]:
    return {
        "question_id": question.id,
        "category": question.category,
        "turns": list(question.turns),
        "reference": list(question.reference),
    }


# --- who is asked


def _who(study: Path, options: GenerateOptions, observer: Observer) -> list[_Asked]:
    """Base models first, each once, then the runs in the comparison's order."""
    cells = [c for c in mappings(load_record(study), "cells") if _is_chat(c)]
    done = [cell for cell in cells if text(cell, "status") == "done"]
    if not done:
        raise UsageError(
            f"{study} has no finished run of a chat task to ask",
            fix="a comparison of chat tasks; `sparsegrad compare` goes on with what is not done",
        )
    if len(done) < len(cells):
        observer.note(f"{len(cells) - len(done)} of {len(cells)} runs are not done, and not asked")
    name = questions_name(options.questions or "")
    bases: list[tuple[ModelSection, _Asked]] = []
    runs = []
    for cell in done:
        run = _run(study, cell, options, name)
        runs.append(run)
        if run.files is None:
            observer.note(f"{run.column['run_dir']}: {run.why}")
            continue
        section = run.files.loaded.recipe.model
        base = next((one for known, one in bases if known == section), None)
        if base is None:
            base = _base(study, section, options)
            bases.append((section, base))
        if run.column["task"] not in base.column["tasks"]:
            base.column["tasks"].append(run.column["task"])
    return [*(base for _, base in bases), *runs]


def _is_chat(cell: Any) -> bool:
    return dig(cell, "run", "task", "kind") == "chat"


def _run(study: Path, cell: Any, options: GenerateOptions, name: str) -> _Asked:
    folder = study / str(cell.get("run_dir"))
    output = folder / FOLDER / f"{name}.jsonl"
    column: dict[str, Any] = {
        "task": text(cell, "task"),
        "method": text(cell, "method"),
        "seed": cell.get("seed"),
        "run_dir": str(cell.get("run_dir")),
        "status": "pending",
        "error": None,
    }
    model = replace(options.model, source=str(folder))
    one = _Asked(column, lambda: load_run(model), output)
    try:
        if not folder.resolve().is_relative_to(study.resolve()):
            raise UsageError(f"{folder} lies outside of {study}", where=str(study / "compare.json"))
        refuse_link(output, study)
        one.files = open_run(folder, options.model.overrides, data=False)
        column["finished"] = one.files.record.get("finished")
    except _ITS_OWN as error:
        one.fail(error)
    return one


def _base(study: Path, section: ModelSection, options: GenerateOptions) -> _Asked:
    name = default_output(section.name, options.questions or "").name
    column: dict[str, Any] = {
        "task": None,
        "method": None,
        "seed": None,
        "tasks": [],
        "model": section.name,
        "dtype": section.dtype,
        "status": "pending",
        "error": None,
    }
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
    """Fill the column; what went wrong with this model alone is written there."""
    column = one.column
    label = column.get("run_dir") or f"base model {column['model']}"
    kept = options.prompt is None
    observer.phase("generate", str(label))
    try:
        lines = _complete_already(one, options, questions) if kept else None
        if lines is None:
            mine = replace(options, output=one.output if kept else None)
            found = _answers(one.load, mine, questions, observer)
            lines, column["asked"] = found["answers"], found["asked"]
        else:
            observer.note(f"all {len(lines)} are answered already")
            column["asked"] = 0
    except _ITS_OWN as error:
        one.fail(error)
        observer.note(f"{label}: {one.why}")
        return
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    about = {key: lines[0].get(key) for key in ("model", "digest", "dtype")}
    column |= {
        **about,
        "status": "done",
        "file": str(one.output.relative_to(study)) if kept else None,
        "answers": [
            {key: line.get(key) for key in ("question_id", "answers", "stopped", "answer_tokens")}
            for line in lines
        ],
    }


def _answers(
    load: _Load, options: GenerateOptions, questions: Sequence[Question], observer: Observer
) -> dict[str, Any]:
    """What the model answers; it is gone when this returns."""
    model, tokenizer, about = load()
    answerer = Answerer(model, tokenizer, options.settings)
    return answer_questions(answerer, about, questions, options, observer)


def _complete_already(
    one: _Asked, options: GenerateOptions, questions: Sequence[Question]
) -> list[dict[str, Any]] | None:
    """The lines of a run that has answered everything with what lies in it now; else None."""
    if one.files is None or not one.output.is_file():
        return None
    records, _ = read_records(one.output)
    common = {
        "settings": options.settings.record(),
        "recipe_digest": one.files.record.get("recipe_digest"),
        "trained": file_digest(one.files.tensors),
    }
    ours = [line for line in records if all(line.get(k) == v for k, v in common.items())]
    return answers_to(questions, ours)
