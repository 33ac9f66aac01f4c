"""One call of ``sparsegrad judge``: answers and questions -> prompts -> verdicts -> summary.

Its folder holds ``verdicts.jsonl``, every prompt with its replies, from which a later call goes on;
and the summary of the last call, ``judge.json`` and ``judge.md``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sparsegrad_cli.error_mapping import mapped_errors
from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.generate.questions import questions_name, read_questions
from sparsegrad_cli.generate.side_by_side import answer_files, is_study, study_of
from sparsegrad_cli.io.atomic import without_nan
from sparsegrad_cli.io.jsonl import Journal
from sparsegrad_cli.io.paths import exists, is_folder, refuse_link
from sparsegrad_cli.judge.answers import Answered, read_answers
from sparsegrad_cli.judge.ask import DECIDED, FAILED, Judge, ask_all
from sparsegrad_cli.judge.endpoint import Endpoint
from sparsegrad_cli.judge.grades import VERDICTS
from sparsegrad_cli.judge.summary import grade_rows, pair_rows
from sparsegrad_cli.judge.tasks import Task, pair_tasks, single_tasks
from sparsegrad_cli.judge.verdicts import is_grade
from sparsegrad_cli.progress import Observer
from sparsegrad_cli.records.answers import JudgeRecord
from sparsegrad_cli.records.base import now
from sparsegrad_cli.records.store import write_json_atomic, write_text_atomic
from sparsegrad_cli.report.judge import judge_document
from sparsegrad_cli.report.render import render

SCHEMA = 1
FORMAT = "sparsegrad-verdicts-1"
RECORD, REPORT = "judge.json", "judge.md"
DEFAULT_KEY = "OPENAI_API_KEY"


@dataclass(frozen=True)
class JudgeOptions:
    """What the command line asks for.

    Attributes:
        answers: files of ``sparsegrad generate``, or a comparison's folder for all that its models
            answered.
        questions: as :func:`read_questions` takes it.
        endpoint, model: who judges.
        key_env: environment variable with the key; None takes OPENAI_API_KEY if that is set.
        output: the folder; None makes one in the comparison whose models answered, where its
            report finds it, or else of the files' names under runs/.
        pairwise: compare two models instead of grading each.
        retries, timeout: see :class:`Endpoint` and :class:`Judge`.
        jobs: requests at a time.
        max_tokens: of a reply; 0 leaves it to the server.
    """

    answers: tuple[Path, ...]
    questions: str
    endpoint: str
    model: str
    key_env: str | None = None
    output: Path | None = None
    pairwise: bool = False
    retries: int = 2
    timeout: float = 120.0
    jobs: int = 4
    max_tokens: int = 1024

    @property
    def folder(self) -> Path:
        """Where verdicts are kept.

        Raises:
            UsageError: in a comparison's folder it is a link to elsewhere.
        """
        if self.output is not None:
            return self.output
        mode = ["pairwise"][: self.pairwise]
        if self.study is not None:
            own = self.study / "-".join(["judge", questions_name(self.questions), *mode])
            return refuse_link(own, self.study)
        stems = list(dict.fromkeys(path.stem for path in self.answers))
        return Path("runs") / "-".join(["judge", *stems, *mode])

    @property
    def study(self) -> Path | None:
        """The comparison whose models answered, where verdicts are kept in its folder."""
        return study_of(self.answers) if self.output is None else None

    def files(self) -> list[Path]:
        """The files of answers.

        Raises:
            UsageError: the models of a comparison have not been asked.
        """
        found: list[Path] = []
        for path in self.answers:
            found += answer_files(path, self.questions) if is_study(path) else [path]
        return found


@mapped_errors(
    again="the same command continues where it stopped",
    memory=("judge", "fewer questions at a time"),
)
def judge_answers(options: JudgeOptions, observer: Observer | None = None) -> dict[str, Any]:
    """Ask for every verdict that is not there yet, and sum up.

    Returns:
        The content of judge.json, with ``output_dir``.

    Raises:
        UsageError: options that do not fit together, or a folder that holds something else.
        DataError, FileFormatError: see :func:`read_questions` and :func:`read_answers`.
        SparsegradError: the endpoint refuses every request, as with a wrong key. What was decided
            before is kept.
    """
    observer = observer or Observer()
    questions = read_questions(options.questions)
    groups, notes = read_answers(options.files(), questions)
    make = pair_tasks if options.pairwise else single_tasks
    tasks = make(questions, groups, options.model)
    if not tasks:
        raise UsageError("no question was answered by both models", where="--pairwise")
    key = _key(options.key_env)
    endpoint = Endpoint(
        options.endpoint,
        key=key,
        timeout=options.timeout,
        retries=options.retries,
    )
    notes += _about_key(options, endpoint.shown, key)
    judge = Judge(endpoint, options.model, options.max_tokens or None, options.retries)
    with _open(options.folder) as journal:
        if journal.torn:
            notes.append(f"{journal.path}: the last line was torn; it is asked again")
        for note in notes:
            observer.note(note)
        verdicts, asked = _complete(judge, tasks, journal, observer, options.jobs)
    record = _record(options, judge, groups, tasks, verdicts, asked=asked, notes=notes)
    write_json_atomic(options.folder / RECORD, record)
    document = judge_document(JudgeRecord.model_validate(without_nan(record)))
    write_text_atomic(options.folder / REPORT, render(document, "md"))
    return record


def _key(name: str | None) -> str | None:
    """The key, from the environment and nowhere else."""
    key = os.environ.get(name or DEFAULT_KEY, "").strip()
    if name is not None and not key:
        raise UsageError(f"the environment variable {name} is not set", where="--key-env")
    return key or None


def _about_key(options: JudgeOptions, shown: str, key: str | None) -> list[str]:
    if key is None:
        return [f"no key is sent: {DEFAULT_KEY} is not set"]
    parts = urlsplit(shown)
    if parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
        return [f"the key goes to {parts.hostname} over http, readable on the way"]
    return []


def _open(folder: Path) -> Journal:
    """The verdicts so far; a folder that holds something else is left alone.

    Raises:
        UsageError, FileFormatError, DiskError: see :class:`Journal`.
    """
    if exists(folder) and not is_folder(folder):
        raise UsageError(f"{folder} is a file, not a folder", where="--output")
    if is_folder(folder) and any(folder.iterdir()) and not (folder / VERDICTS).is_file():
        raise UsageError(
            f"the folder {folder} is not empty, and holds no verdicts to go on with",
            where="--output",
            fix="name another folder",
        )
    return Journal(folder / VERDICTS, FORMAT)


def _complete(
    judge: Judge, tasks: Sequence[Task], journal: Journal, observer: Observer, jobs: int
) -> tuple[dict[str, dict[str, Any]], int]:
    """Verdicts by key, those that were missing asked for; and how many were."""
    verdicts = {str(record.get("key")): record for record in journal.records}
    by_key = {task.key: task for task in tasks}
    todo = [task for key, task in by_key.items() if not _decided(verdicts.get(key), task)]
    if len(todo) < len(by_key):
        observer.note(f"{len(by_key) - len(todo)} of {len(by_key)} verdicts are there already")
    observer.total_steps("judge", len(by_key))
    done = len(by_key) - len(todo)
    observer.step("judge", {"step": done})
    for record in ask_all(judge, todo, jobs):
        journal.append(record)
        verdicts[record["key"]] = record
        done += 1
        if record["status"] == FAILED:
            observer.note(_failure(record))
        observer.step("judge", {"step": done})
    return verdicts, len(todo)


def _decided(record: Mapping[str, Any] | None, task: Task) -> bool:
    """Whether a record holds a verdict that can be counted, as one from anywhere may not."""
    if record is None or record.get("status") != DECIDED:
        return False
    verdict = record.get("verdict")
    if task.pairwise:
        return verdict in ("A", "B", "C")
    return is_grade(verdict)


def _failure(record: Mapping[str, Any]) -> str:
    """One line about a prompt without a reply."""
    models = " and ".join(record["models"])
    return f"{models}, question {record['question_id']}, turn {record['turn']}: {record['reason']}"


def _record(
    options: JudgeOptions,
    judge: Judge,
    groups: Sequence[Answered],
    tasks: Sequence[Task],
    verdicts: Mapping[str, Mapping[str, Any]],
    *,
    asked: int,
    notes: Sequence[str],
) -> dict[str, Any]:
    """judge.json."""
    used = {task.key: verdicts[task.key] for task in tasks}
    failures = [_failure(record) for record in used.values() if record["status"] == FAILED]
    rows = (pair_rows if options.pairwise else grade_rows)(tasks, verdicts)
    return {
        "schema": SCHEMA,
        "mode": "pairwise" if options.pairwise else "single",
        "status": "failed" if failures else "done",
        "judge": judge.model,
        "endpoint": judge.endpoint.shown,
        "questions": options.questions,
        "answers": [
            {
                "model": group.label,
                "file": group.file,
                "digest": group.digest,
                "settings": group.settings,
                "questions": len(group.answers),
            }
            for group in groups
        ],
        "rows": rows,
        "requests": {"asked": asked, "kept": len(used) - asked},
        "failures": failures,
        "notes": list(notes),
        "finished": now(),
        "output_dir": str(options.folder),
    }
