"""Load the data of a task from its settings, as a recipe's task section gives them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsegrad_cli.data import load_task as loading
from sparsegrad_cli.data.conversation import ChatData
from sparsegrad_cli.data.examples import TextData
from sparsegrad_cli.recipe.task_section import ChatSection, ColumnsSection, TaskSection


def load_task(
    name: str, *, path: Path | str | None = None, columns: Any = None, **settings: Any
) -> TextData:
    """Load texts with labels; ``settings`` are keys of the task section."""
    return loading.load_task(
        TaskSection(
            name=name,
            path=None if path is None else str(path),
            columns=None if columns is None else ColumnsSection(**columns),
            **settings,
        )
    )


def chat_task(name: str, *, path: Path | str | None = None, **settings: Any) -> TaskSection:
    """Make the section of a chat task; ``settings`` are its keys and those of ``task.chat``."""
    own = {key: settings.pop(key) for key in tuple(settings) if key in TaskSection.model_fields}
    where = None if path is None else str(path)
    return TaskSection(name=name, path=where, chat=ChatSection(**settings), **own)


def load_chat(name: str, *, path: Path | str | None = None, **settings: Any) -> ChatData:
    """Load conversations; ``settings`` as in :func:`chat_task`."""
    return loading.load_chat(chat_task(name, path=path, **settings))
