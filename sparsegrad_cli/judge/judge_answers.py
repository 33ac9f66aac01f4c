"""Judge answers: read them, ask for the missing verdicts, write a summary.

The output folder holds ``verdicts.jsonl`` with every prompt and its replies, to which a later call
adds the missing ones. The summary of the last call is in ``judge.json`` and ``judge.md``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from sparsegrad_cli.data.questions import questions_name, read_questions
from sparsegrad_cli.error_mapping import mapped_errors
from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.generate.answer_files import answer_files, is_study, study_of
from sparsegrad_cli.io.atomic import write_text_atomic
from sparsegrad_cli.io.jsonl import Journal
from sparsegrad_cli.io.paths import exists, is_folder, refuse_link
from sparsegrad_cli.judge.endpoint import Endpoint, Judge
from sparsegrad_cli.judge.tasks import Answered, Task, pair_tasks, read_answers, single_tasks
from sparsegrad_cli.judge.verdicts import VERDICTS, grade_rows, pair_rows, read_verdict
from sparsegrad_cli.progress import Observer
from sparsegrad_cli.records.answers import JudgedAnswers, JudgeRecord, JudgeRequests, JudgeVerdict
from sparsegrad_cli.records.base import now
from sparsegrad_cli.records.store import write
from sparsegrad_cli.report.judge import judge_document
from sparsegrad_cli.report.render import render

FORMAT = "sparsegrad-verdicts-1"
RECORD, REPORT = "judge.json", "judge.md"
DEFAULT_KEY = "OPENAI_API_KEY"


@dataclass(frozen=True)
class JudgeOptions:
    """The options of ``sparsegrad judge``.

    Attributes:
        answers: Files of ``sparsegrad generate``, or the folder of a comparison for all its models.
        questions: See :func:`read_questions`.
        endpoint: Address of the server.
        model: Name of the judging model there.
        key_env: Environment variable with the key; None uses OPENAI_API_KEY if that is set.
        output: The output folder. None uses a folder in the comparison whose models answered, where
            its report finds it, or else a folder under runs/ that is named after the files.
        pairwise: Compare two models instead of grading single answers.
        retries: See :class:`Endpoint` and :class:`Judge`.
        timeout: Seconds for one request.
        jobs: Number of parallel requests.
        max_tokens: Largest number of tokens of a reply; 0 uses the server's limit.
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
        """The output folder.

        Raises:
            UsageError: The folder is a link in the folder of a comparison.
        """
        if self.output is not None:
            return self.output
        mode = ["pairwise"] if self.pairwise else []
        if self.study is not None:
            own = self.study / "-".join(["judge", questions_name(self.questions), *mode])
            return refuse_link(own, self.study)
        stems = list(dict.fromkeys(path.stem for path in self.answers))
        return Path("runs") / "-".join(["judge", *stems, *mode])

    @property
    def study(self) -> Path | None:
        """The comparison whose models answered, if the verdicts are kept in its folder."""
        return study_of(self.answers) if self.output is None else None

    def files(self) -> list[Path]:
        """Return the files of answers.

        Raises:
            UsageError: The models of a comparison have not been asked.
        """
        found: list[Path] = []
        for path in self.answers:
            found += answer_files(path, self.questions) if is_study(path) else [path]
        return found


@mapped_errors(
    again="the same command continues where it stopped",
    memory=("judge", "fewer questions at a time"),
)
def judge_answers(options: JudgeOptions, observer: Observer | None = None) -> JudgeRecord:
    """Ask for every missing verdict, and write the summary.

    Returns:
        The content of judge.json.

    Raises:
        UsageError: Options contradict each other, or the output folder holds other files.
        DataError, FileFormatError: See :func:`read_questions` and :func:`read_answers`.
        SparsegradError: The endpoint refuses every request. Earlier verdicts are kept.
    """
    observer = observer or Observer()
    questions = read_questions(options.questions)
    groups, notes = read_answers(options.files(), questions)
    make = pair_tasks if options.pairwise else single_tasks
    tasks = make(questions, groups, options.model)
    if not tasks:
        raise UsageError("no question was answered by both models", where="--pairwise")
    key = _key(options.key_env)
    endpoint = Endpoint(options.endpoint, key=key, timeout=options.timeout, retries=options.retries)
    notes += _key_notes(endpoint.shown, key)
    judge = Judge(endpoint, options.model, options.max_tokens or None, options.retries)
    with _open(options.folder) as journal:
        if journal.torn:
            notes.append(f"{journal.path}: the last line was incomplete; it is requested again")
        for note in notes:
            observer.note(note)
        verdicts, asked = _complete(judge, tasks, journal, observer, options.jobs)
    verdicts = {task.key: verdicts[task.key] for task in tasks}
    failures = [_failure(line) for line in verdicts.values() if line.status == "failed"]
    rows = (pair_rows if options.pairwise else grade_rows)(tasks, verdicts)
    record = JudgeRecord.model_validate(
        {
            "mode": "pairwise" if options.pairwise else "single",
            "status": "failed" if failures else "done",
            "judge": judge.model,
            "endpoint": endpoint.shown,
            "questions": options.questions,
            "answers": [_judged(group) for group in groups],
            "rows": rows,
            "requests": JudgeRequests(asked=asked, kept=len(verdicts) - asked),
            "failures": failures,
            "notes": notes,
            "finished": now(),
            "output_dir": str(options.folder),
        }
    )
    write(record, options.folder / RECORD)
    write_text_atomic(options.folder / REPORT, render(judge_document(record), "md"))
    return record


def _judged(group: Answered) -> JudgedAnswers:
    return JudgedAnswers(
        model=group.label,
        file=group.file,
        digest=group.digest,
        settings=None if group.settings is None else dict(group.settings),
        questions=len(group.answers),
    )


def _key(name: str | None) -> str | None:
    """Return the key, which is read from the environment only."""
    key = os.environ.get(name or DEFAULT_KEY, "").strip()
    if name is not None and not key:
        raise UsageError(f"the environment variable {name} is not set", where="--key-env")
    return key or None


def _key_notes(shown: str, key: str | None) -> list[str]:
    if key is None:
        return [f"no key is sent: {DEFAULT_KEY} is not set"]
    parts = urlsplit(shown)
    if parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
        return [f"the key is sent to {parts.hostname} over http, without encryption"]
    return []


def _open(folder: Path) -> Journal:
    """Open the verdicts so far; refuse a folder with other files.

    Raises:
        UsageError, FileFormatError, DiskError: See :class:`Journal`.
    """
    if exists(folder) and not is_folder(folder):
        raise UsageError(f"{folder} is a file, not a folder", where="--output")
    if is_folder(folder) and any(folder.iterdir()) and not (folder / VERDICTS).is_file():
        raise UsageError(
            f"the folder {folder} is not empty and holds no verdicts to continue",
            where="--output",
            fix="name another folder",
        )
    return Journal(folder / VERDICTS, FORMAT)


def _complete(
    judge: Judge, tasks: Sequence[Task], journal: Journal, observer: Observer, jobs: int
) -> tuple[dict[str, JudgeVerdict], int]:
    """Return the verdicts by key, and the number that this call asked for."""
    lines = (read_verdict(record) for record in journal.records)
    verdicts = {line.key: line for line in lines if line is not None}
    by_key = {task.key: task for task in tasks}
    decided = {key for key, line in verdicts.items() if line.status == "decided"}
    todo = [task for key, task in by_key.items() if key not in decided]
    done = len(by_key) - len(todo)
    if done:
        observer.note(f"{done} of {len(by_key)} verdicts are known already")
    observer.phase("judge", f"{len(by_key)} verdicts")
    observer.total_steps("judge", len(by_key), done=done, unit="verdicts")
    for line in judge.verdicts(todo, jobs):
        journal.append(line.to_json())
        verdicts[line.key] = line
        done += 1
        if line.status == "failed":
            observer.note(_failure(line))
        observer.step("judge", {"step": done})
    return verdicts, len(todo)


def _failure(line: JudgeVerdict) -> str:
    """Return one line about a prompt without a reply."""
    models = " and ".join(line.models)
    return f"{models}, question {line.question_id}, turn {line.turn}: {line.reason}"
