"""Read the data that the task section of a recipe names."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from sparsegrad_cli.data.chat_files import (
    check_chat_columns,
    load_chat_files,
    load_chat_mix,
    load_chat_sets,
    load_hub_chat,
)
from sparsegrad_cli.data.conversation import ChatData, RawChat
from sparsegrad_cli.data.conversation import finish as finish_chat
from sparsegrad_cli.data.examples import Examples, RawTexts, TextData, finish
from sparsegrad_cli.data.glue import load_hub_glue, load_local_glue
from sparsegrad_cli.data.labelled_files import check_columns, load_labelled_files
from sparsegrad_cli.data.oasst_files import load_oasst
from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.io.paths import expanded
from sparsegrad_cli.io.suggest import suggest
from sparsegrad_cli.recipe.task_section import ChatSection, TaskSection
from sparsegrad_cli.recipe.tasks import (
    BUILTIN_TASKS,
    CHAT_TASKS,
    FILE_TASKS,
    GLUE_TASKS,
    check_settings,
    known_task_names,
)

_BUILTIN_SIZES: dict[Literal["train", "validation"], int] = {"train": 4000, "validation": 1000}


def load_task(task: TaskSection) -> TextData:
    """Load texts with labels as data sets that are ready to be tokenized.

    Raises:
        UsageError, DataError, DownloadError: as :func:`read_task`.
        DataError: a split is empty.
    """
    return finish(read_task(task), task)


def read_task(task: TaskSection) -> RawTexts:
    """Read all texts and labels of a task.

    GLUE without a path comes from the hub or from its local cache.

    Raises:
        UsageError: the task is unknown, or a setting does not fit the task or its labels.
        DataError: files are missing or damaged, a split is empty, or a row does not fit.
        DownloadError: GLUE is neither cached nor reachable.
    """
    check_settings(task)
    name, path = task.name, expanded(task.path) if task.path else None
    if name in FILE_TASKS:
        if task.mix is None:
            _require_path(task, f"the {name} file, or a folder with train and validation files")
        return load_labelled_files(task)
    if task.columns is not None and any(task.columns.model_dump().values()):
        raise UsageError(
            f"task.columns has no effect: the columns of {name} are known",
            where="task.columns",
            fix=f"leave it out, or set task.name to one of {', '.join(FILE_TASKS)}",
        )
    glue = name.removeprefix("glue/")
    if name.startswith("glue/") and glue in GLUE_TASKS:
        return load_local_glue(glue, path) if path is not None else load_hub_glue(glue)
    if name in BUILTIN_TASKS:
        _refuse_path(task)
        return _builtin(name)
    raise _unknown(name)


def load_chat(task: TaskSection) -> ChatData:
    """Load conversations: OpenAssistant trees, the user's own files, or the built-in sample.

    Raises:
        UsageError: the task is unknown, or a setting does not fit the data.
        DataError: files are missing or damaged, or no conversation is left.
        DownloadError: the data set is neither cached nor reachable on the hub.
    """
    raw = _read_chat(task)
    if task.evaluation is not None:
        sets, notes = load_chat_sets(task)
        raw = replace(raw, evaluation=sets, notes=[*raw.notes, *notes])
    return finish_chat(raw, task)


def check_file_columns(task: TaskSection) -> None:
    """Check that the files of a task have the columns that the task needs.

    Raises:
        UsageError, DataError: as :func:`load_task` and :func:`load_chat`.
    """
    if task.name in FILE_TASKS:
        check_columns(task)
    elif task.name == "chat":
        check_chat_columns(task)


def _read_chat(task: TaskSection) -> RawChat:
    hub = (task.chat or ChatSection()).hub
    if task.train_paths and hub is not None:
        key = "task.path" if task.mix is None else "task.mix"
        raise UsageError(f"Expected either {key} or task.chat.hub, got both", where="task.chat.hub")
    if task.name == "oasst":
        return load_oasst(task)
    if task.name == "chat":
        if hub is not None:
            return load_hub_chat(task)
        if task.mix is not None:
            return load_chat_mix(task)
        fix = "a file, a folder with train and validation files, or task.chat.hub"
        _require_path(task, fix)
        return load_chat_files(task)
    if task.name not in CHAT_TASKS:
        raise _unknown(task.name)
    from sparsegrad_cli.data.builtin.dialogues import load_dialogues

    _refuse_path(task)
    return load_dialogues(task)


def _builtin(name: str) -> RawTexts:
    from sparsegrad_cli.data.builtin.acceptability import generate

    parts: dict[str, Examples] = {}
    for split, size in _BUILTIN_SIZES.items():
        rows = generate(split, size)  # a fixed seed: every run sees the same data
        parts[split] = Examples([row.sentence for row in rows], None, [row.label for row in rows])
    return RawTexts(BUILTIN_TASKS[name], parts["train"], {"validation": parts["validation"]})


def _require_path(task: TaskSection, fix: str) -> None:
    if task.path is None:
        raise UsageError(f"task {task.name} needs a path", where="task.path", fix=fix)


def _refuse_path(task: TaskSection) -> None:
    if task.path is not None:
        raise UsageError(f"{task.name} is generated and takes no path", where="task.path")


def _unknown(name: str) -> UsageError:
    fix = suggest(name, known_task_names())
    return UsageError(f"unknown task {name!r}", where="task.name", fix=fix)
