"""Where the answers to the same questions by all runs of a comparison lie. Imports no torch.

STUDY/answers/<questions>.json                all of them side by side, for reports
STUDY/answers/<model>-<questions>.jsonl       those of a model that runs began as
STUDY/cells/<cell>/answers/<questions>.jsonl  those of a run
STUDY/judge-<questions>/                      their grades
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsegrad_cli.errors import FileFormatError, UsageError
from sparsegrad_cli.generate.questions import questions_name
from sparsegrad_cli.io.bounded_json import plain_json
from sparsegrad_cli.io.paths import expanded, is_file

SCHEMA = 1
FOLDER = "answers"


def is_study(path: str | Path) -> bool:
    """Whether this is the folder of a comparison, and of no run."""
    folder = expanded(path)
    return is_file(folder / "compare.json") and not is_file(folder / "run.json")


def side_by_side_file(study: Path, questions: str) -> Path:
    """The record of all answers to these questions."""
    return study / FOLDER / f"{questions_name(questions)}.json"


def read_side_by_side(path: Path) -> dict[str, Any]:
    """A record that :func:`side_by_side_file` names.

    Raises:
        FileFormatError: it cannot be read, or is of another version.
    """
    try:
        record = plain_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise FileFormatError(f"cannot be read: {error}", where=str(path)) from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise FileFormatError(
            f"holds no answers that this version reads (schema {SCHEMA})",
            where=str(path),
            fix="sparsegrad generate writes it anew",
        )
    return record


def answer_files(study: Path, questions: str) -> list[Path]:
    """The files of all answers to these questions, base models first.

    Raises:
        UsageError: nobody has been asked, or the record names a file outside of the comparison.
        FileFormatError: see :func:`read_side_by_side`.
    """
    record = study / FOLDER / f"{questions_name(questions)}.json"
    columns = read_side_by_side(record).get("columns") if record.is_file() else None
    columns = columns if isinstance(columns, list) else []
    named = [c["file"] for c in columns if isinstance(c, dict) and isinstance(c.get("file"), str)]
    found = [path for name in dict.fromkeys(named) if is_file(path := study / name)]
    for path in found:
        if not path.resolve().is_relative_to(study.resolve()):
            raise UsageError(f"{path} lies outside of {study}", where=str(record))
    if not found:
        raise UsageError(
            f"nobody in {study} has answered {questions}",
            fix=f"sparsegrad generate {study} --prompts {questions}",
        )
    return found


def study_of(paths: Sequence[Path]) -> Path | None:
    """The comparison that all of these are, or hold answers of; None where there is no such one."""
    found = {_study_of(path) for path in paths}
    return found.pop() if len(found) == 1 else None


def _study_of(path: Path) -> Path | None:
    above = path.parents
    if path.parent.name == FOLDER:
        candidates = [above[1], *above[3:4]]
        return next((folder for folder in candidates if is_study(folder)), None)
    return path if is_study(path) else None
