"""Find the files with the answers of a comparison, and check their lines. Imports no torch.

STUDY/answers/<questions>.json                the answers of all models, for reports
STUDY/answers/<model>-<questions>.jsonl       those of a base model
STUDY/cells/<cell>/answers/<questions>.jsonl  those of a run
STUDY/judge-<questions>/                      their grades
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sparsegrad_cli.data.questions import questions_name
from sparsegrad_cli.errors import FileFormatError, UsageError
from sparsegrad_cli.io.paths import expanded, is_file
from sparsegrad_cli.records.answers import AnswerLine, AnswersRecord
from sparsegrad_cli.records.base import problems
from sparsegrad_cli.records.store import read_object, validated

FOLDER = "answers"


def is_study(path: str | Path) -> bool:
    """Return whether a path is the folder of a comparison and not of a run."""
    folder = expanded(path)
    return is_file(folder / "compare.json") and not is_file(folder / "run.json")


def side_by_side_file(study: Path, questions: str) -> Path:
    """Return the path of the record of all answers to these questions."""
    return study / FOLDER / f"{questions_name(questions)}.json"


def answer_files(study: Path, questions: str) -> list[Path]:
    """Return the files with the answers to these questions, base models first.

    Raises:
        UsageError: No model has been asked, or the record names a file outside the comparison.
        FileFormatError: The record is damaged.
    """
    record = side_by_side_file(study, questions)
    columns = []
    if is_file(record):
        columns = validated(AnswersRecord, read_object(record), record).columns
    named = dict.fromkeys(column.file for column in columns if column.file is not None)
    found = [path for name in named if is_file(path := study / name)]
    for path in found:
        if not path.resolve().is_relative_to(study.resolve()):
            raise UsageError(f"{path} lies outside {study}", where=str(record))
    if not found:
        raise UsageError(
            f"no model of {study} has answered {questions}",
            fix=f"sparsegrad generate {study} --prompts {questions}",
        )
    return found


def check_line(record: Mapping[str, Any], where: str) -> AnswerLine:
    """Return a line of a file of answers as a model.

    Raises:
        FileFormatError: It is not a line that ``sparsegrad generate`` writes.
    """
    try:
        if "question_id" in record and "answers" in record:
            return AnswerLine.model_validate(record)
        found = "expected the keys question_id and answers"
    except ValidationError as error:
        found = problems(error)
    raise FileFormatError(
        f"the line is not an answer: {found}",
        where=where,
        fix="`sparsegrad generate RUN --prompts FILE` writes such lines",
    )


def study_of(paths: Sequence[Path]) -> Path | None:
    """Return the comparison that all paths belong to, or None if there is not exactly one."""
    found = {_study_of(path) for path in paths}
    return found.pop() if len(found) == 1 else None


def _study_of(path: Path) -> Path | None:
    above = path.parents
    if path.parent.name == FOLDER:
        candidates = [above[1], *above[3:4]]
        return next((folder for folder in candidates if is_study(folder)), None)
    return path if is_study(path) else None
