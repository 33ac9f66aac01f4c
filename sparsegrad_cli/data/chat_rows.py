"""One row of a chat file to turns: ``messages``, ``prompt``/``completion``, Alpaca's columns."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from sparsegrad_cli.data.conversation import Role, Turn
from sparsegrad_cli.data.text_files import is_text
from sparsegrad_cli.errors import DataError

ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
# Where a message keeps its role and its text: the chat API's way, and ShareGPT's.
_KEYS = (("role", "content"), ("from", "value"))
_CALLS = ("tool_calls", "function_call")


class UnusableRowError(Exception):
    """A row that cannot be learnt from; the message is the reason, for the counts."""


def turns_of_messages(row: Mapping[str, Any], column: str, place: str) -> list[Turn]:
    """Turns of a row whose ``column`` is a list of messages; every assistant's is learnt.

    Raises:
        UnusableRowError: damaged.
        DataError: something else than text in it.
    """
    return _messages(row.get(column), place, learn=True)


def turns_of_completion(row: Mapping[str, Any], place: str) -> list[Turn]:
    """Turns of ``prompt`` and ``completion``, each a text or a list of messages.

    Only the completion is learnt, also where the prompt holds earlier turns of the assistant.
    """
    turns: list[Turn] = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        value = row.get(key)
        if isinstance(value, str):
            value = [{"role": role, "content": value}]
        turns += _messages(value, place, learn=key == "completion")
    return turns


def turns_of_instruction(row: Mapping[str, Any], place: str) -> list[Turn]:
    """Turns of ``instruction``, ``input`` (may be empty or missing) and ``output``.

    The input follows the instruction after a blank line.
    """
    for key in ("instruction", "input", "output"):
        value = row.get(key)
        if not isinstance(value, str) and not (key == "input" and value is None):
            raise UnusableRowError(f"{key} is missing or not text")
    question = row["instruction"]
    if (row.get("input") or "").strip():
        question = f"{question}\n\n{row['input']}"
    return [_turn("user", question, learn=False), _turn("assistant", row["output"], learn=True)]


def settled(turns: list[Turn], system: Any) -> tuple[tuple[Turn, ...], dict[str, int]]:
    """The turns as a conversation may have them, and what was cut.

    An optional system turn first, then user and assistant by turns, the last one learnt. What the
    user says after that is cut, and so is an empty system turn.

    Args:
        turns: as they stand in the row.
        system: the row's own ``system`` column: text that goes first, or None.

    Raises:
        UnusableRowError: they cannot be put so.
    """
    cut: dict[str, int] = {}
    if isinstance(system, str) and system.strip():
        turns = [_turn("system", system, learn=False), *turns]
    elif system is not None and not isinstance(system, str):
        raise UnusableRowError("system is not text")
    if turns and turns[0].role == "system" and not turns[0].text.strip():
        turns = turns[1:]
        cut["empty system turns cut"] = 1
    learnt = [at for at, turn in enumerate(turns, start=1) if turn.learn]
    if learnt and learnt[-1] < len(turns):
        cut["turns cut, no learnt one follows them"] = len(turns) - learnt[-1]
    turns = turns[: learnt[-1]] if learnt else []
    if not turns:
        raise UnusableRowError("no turn of the assistant")
    for at, turn in enumerate(turns):
        if not turn.text.strip():
            raise UnusableRowError("a turn is empty")
        if turn.role == "system" and at > 0:
            raise UnusableRowError("a system turn that is not the first")
    spoken = [turn.role for turn in turns if turn.role != "system"]
    if spoken[0] != "user":
        raise UnusableRowError("begun by the assistant")
    if any(one == other for one, other in pairwise(spoken)):
        raise UnusableRowError("two turns of one role in a row")
    return tuple(turns), cut


def _messages(value: Any, place: str, *, learn: bool) -> list[Turn]:
    if not isinstance(value, list):
        raise UnusableRowError("the turns are missing or not a list")
    turns = []
    for message in value:
        if not isinstance(message, dict):
            raise UnusableRowError("a turn is not an object")
        keys = next((keys for keys in _KEYS if message.get(keys[0]) is not None), _KEYS[0])
        said = message.get(keys[0])
        role = ROLES.get(said.lower()) if isinstance(said, str) else None
        if role is None:
            raise UnusableRowError("a role that is not system, user or assistant")
        if any(message.get(key) for key in _CALLS):
            raise UnusableRowError("a turn calls a tool")
        text = _text(message.get(keys[1]), place)
        turns.append(_turn(role, text, learn=learn and role == "assistant"))
    return turns


def _text(content: Any, place: str) -> str:
    """The text of a message's content: a string, or text parts, which are put together as is."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UnusableRowError("a turn's text is missing or not text")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise DataError(
                f"a message holds a part of type {kind!r}: only text can be learnt",
                where=place,
                fix="leave such rows out, or such parts where the text stands by itself",
            )
        if kind is None or not isinstance(part.get("text"), str):
            raise UnusableRowError("a part of a turn is not text")
        texts.append(part["text"])
    return "".join(texts)


def _turn(role: Role, text: str, *, learn: bool) -> Turn:
    if not is_text(text):
        raise UnusableRowError("text is not valid Unicode")
    return Turn(role, text, learn)
