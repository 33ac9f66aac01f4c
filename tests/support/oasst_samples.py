"""Small OpenAssistant trees, and conversations as short texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sparsegrad_cli.data.conversation import ChatData, Conversation
from support.task_data import load_chat


def node(name: str, *replies: dict[str, Any], **extra: Any) -> dict[str, Any]:
    """Return a message with nested replies. Its name is its id and text.

    A name that begins with ``a`` (after the last slash) is the assistant's.
    """
    role = "assistant" if name.rsplit("/", 1)[-1].startswith("a") else "prompter"
    made = {"message_id": name, "text": name, "role": role, "lang": "en", "deleted": False}
    for reply in replies:
        reply.setdefault("parent_id", name)
    return made | {"review_result": True, "replies": list(replies)} | extra


def tree(root: dict[str, Any], **extra: Any) -> dict[str, Any]:
    """Return a tree as the data set stores it, around a root message."""
    made = {"message_tree_id": root["message_id"], "tree_state": "ready_for_export"}
    return made | {"prompt": root} | extra


def flat(root: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the messages of a tree without nesting, parents first."""
    left, found = [root], []
    while left:
        message = left.pop()
        found.append({"parent_id": None} | {k: v for k, v in message.items() if k != "replies"})
        left.extend(reversed(message["replies"]))
    return found


def write(path: Path, *records: Any) -> Path:
    """Write JSON lines; a record that is a string is written unchanged."""
    lines = [each if isinstance(each, str) else json.dumps(each) for each in records]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def read(path: Path, name: str = "oasst", **settings: Any) -> ChatData:
    """Load both splits of a file."""
    return load_chat(name, path=path, **settings)


def as_text(conversation: Conversation) -> str:
    """Return the texts, with a star after each that is trained on: ``p1 a1* p2 a2*``."""
    return " ".join(turn.text + "*" * turn.learn for turn in conversation.turns)


def all_conversations(data: ChatData) -> set[str]:
    """Return all conversations of both splits, and check that none is repeated."""
    every = [as_text(each) for each in [*data.train, *data.validation]]
    assert len(set(every)) == len(every)
    return set(every)


def large_tree() -> dict[str, Any]:
    """Return p1 with three answers; the best is last, with two follow-ups, one unanswered."""
    return node(
        "p1",
        node("a1", rank=2),
        node("a2", node("p2", node("a3")), node("p3"), rank=1),
        node(
            "a4",
            node("p4"),
            node("p5", node("a5", node("p6"), rank=1), node("a6", rank=0)),
            rank=0,
        ),
    )


def small_tree() -> dict[str, Any]:
    return node("q1", node("a7"))


# Lists, because they are in source order.
EXPECTED = {
    "threads": [
        "p1 a1*",
        "p1 a2* p2 a3*",
        "p1 a4* p5 a5*",
        "p1 a4* p5 a6*",
        "q1 a7*",
    ],
    "best": ["p1 a4* p5 a6*", "q1 a7*"],
    "replies": [
        "p1 a1*",
        "p1 a2*",
        "p1 a2 p2 a3*",
        "p1 a4*",
        "p1 a4 p5 a5*",
        "p1 a4 p5 a6*",
        "q1 a7*",
    ],
}


def groups_by_split(data: ChatData) -> tuple[set[str], set[str]]:
    return {each.group for each in data.train}, {each.group for each in data.validation}
