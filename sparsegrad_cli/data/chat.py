"""Load conversation data by name: OpenAssistant, the user's own, the built-in sample."""

from __future__ import annotations

from pathlib import Path

from sparsegrad_cli.data.chat_dataset import RawChat, finish
from sparsegrad_cli.data.chat_settings import CHAT_TASKS, ChatSettings
from sparsegrad_cli.data.conversation import ChatData
from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.io.suggest import suggest


def load_chat(
    name: str,
    *,
    path: str | Path | None = None,
    settings: ChatSettings | None = None,
    train_limit: int | None = None,
    eval_limit: int | None = None,
) -> ChatData:
    """Load the conversations ``name``.

    Args:
        name: ``oasst``, ``chat`` or ``builtin:dialogues``.
        path: file or folder; oasst without one comes from the hub or its cache, chat from
            ``settings.hub``.
        settings: how to read and split; None takes the defaults.
        train_limit: use the FIRST n training conversations, in source order; None uses all.
        eval_limit: use the first n validation conversations; None uses all.

    Raises:
        UsageError: an unknown name, or an argument that does not go with it.
        DataError: missing or damaged files, nothing left to learn from.
        DownloadError: it must come from the hub and cannot.
    """
    settings = settings or ChatSettings()
    if name not in CHAT_TASKS:
        raise UsageError(f"unknown task {name!r}", where="task.name", fix=suggest(name, CHAT_TASKS))
    settings.check(name)
    if path is not None and settings.hub is not None:
        raise UsageError(
            "the data comes from a path or from the hub, not from both", where="task.chat.hub"
        )
    raw = _load(name, Path(path).expanduser() if path is not None else None, settings)
    last_only = settings.train_on == "last_answer"
    return finish(raw, train_limit, eval_limit, last_only=last_only)


def _load(name: str, path: Path | None, settings: ChatSettings) -> RawChat:
    if name == "oasst":
        from sparsegrad_cli.data.oasst import load_oasst

        return load_oasst(path, settings)
    if name == "chat":
        from sparsegrad_cli.data.chat_files import load_chat_files, load_hub_chat

        if path is None and settings.hub is None:
            raise UsageError(
                "task chat needs a path or a data set of the hub",
                where="task.path",
                fix="a file, a folder with train and validation files, or task.chat.hub",
            )
        return load_chat_files(path, settings) if path is not None else load_hub_chat(settings)
    if path is not None:
        raise UsageError(f"{name} is generated and takes no path", where="task.path")
    from sparsegrad_cli.data.builtin.dialogues import load_dialogues

    return load_dialogues(settings)
