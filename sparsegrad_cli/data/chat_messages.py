"""Turn one message of a chat file into a turn: role, text, tool calls, reasoning, loss weight."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from sparsegrad_cli.data.conversation import Role, Turn
from sparsegrad_cli.data.json_files import parse_json
from sparsegrad_cli.data.text_files import is_unicode
from sparsegrad_cli.errors import DataError
from sparsegrad_cli.io.bounded_json import plain_json

# Keys that say whether a message is learnt, as OpenAI, Mistral, Axolotl, ms-swift and others write.
LOSS_KEYS = ("weight", "loss_weight", "train", "training", "trainable", "loss", "loss_mask")

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",  # OpenAI's newer name
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",  # LLaMA-Factory's: the text is the call
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
# Keys of role and text: the chat API's, and ShareGPT's.
_KEYS = (("role", "content"), ("from", "value"))
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_PASSED_KEYS = ("name", "tool_call_id")
_WITHOUT_TEXT = {"tool_calls", "reasoning_content"}  # extras that a turn may have without a text
_LEARNT = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}


class UnusableRowError(Exception):
    """A row that cannot be learnt from; the message is the reason, for the counts."""


@dataclass(frozen=True)
class Message:
    """A message as a turn.

    Attributes:
        turn: what it says.
        loss_values: loss key -> its value, for the keys that the message has.
        unused: keys that nothing reads.
    """

    turn: Turn
    loss_values: Mapping[str, Any]
    unused: Sequence[str]


def read_message(message: Any, place: str, *, learn: bool) -> Message:
    """Read one message.

    Args:
        message: an object in the chat API's form or in ShareGPT's.
        place: place of its row, for errors.
        learn: whether a turn of the assistant is learnt, its own loss keys aside.

    Raises:
        UnusableRowError: the message is damaged.
        DataError: the message holds a part that is not text.
    """
    if not isinstance(message, dict):
        raise UnusableRowError("a turn is not an object")
    role_key, text_key = next(
        (keys for keys in _KEYS if message.get(keys[0]) is not None), _KEYS[0]
    )
    name = message.get(role_key)
    role = _ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise UnusableRowError("a role that is not system, user, assistant or tool")
    content, extra = message.get(text_key), _extra(message)
    if str(name).lower() == "function_call":
        content, extra["tool_calls"] = None, _calls(content)
    if content is None and _WITHOUT_TEXT & extra.keys():
        content = ""
    text = _text(content, place)
    if not is_unicode(text):
        raise UnusableRowError("text is not valid Unicode")
    known = {
        *(role_key, text_key, "tool_calls", "function_call"),
        *LOSS_KEYS,
        *_REASONING_KEYS,
        *_PASSED_KEYS,
    }
    return Message(
        Turn(role, text, learn and role == "assistant", extra),
        {key: message[key] for key in LOSS_KEYS if is_given(message.get(key))},
        [key for key in message if key not in known and is_given(message[key])],
    )


def is_empty(turn: Turn) -> bool:
    """Return whether a turn says nothing. A call may have no text, and a tool may return none."""
    return not (turn.text.strip() or _WITHOUT_TEXT & turn.extra.keys() or turn.role == "tool")


def is_given(value: Any) -> bool:
    """Return whether the value of a key says anything."""
    return value is not None and value != "" and value != [] and value != {}


def is_loss_value(value: Any) -> bool:
    """Return whether a value is 0 or 1 (false or true), so that it can say what is learnt."""
    return str(value).lower() in _LEARNT


def is_learnt(what: str, value: Any, place: str) -> bool:
    """Return whether a loss key asks for its turn to be learnt.

    Args:
        what: the key and its message, for the error.
        value: the key's value.
        place: place of the row.

    Raises:
        DataError: the value is neither 0 nor 1.
    """
    if not is_loss_value(value):
        raise DataError(
            f"{what} is {value!r}, expected 0 or 1 (false or true): a turn is learnt or it is not",
            where=place,
            fix="round it to 0 or 1, or remove the key",
        )
    return _LEARNT[str(value).lower()]


def read_tools(row: Mapping[str, Any]) -> list[Any] | None:
    """Return the tools of a row: ``tools``, or ``functions`` as OpenAI called them at first.

    Raises:
        UnusableRowError: they are not a list of objects.
    """
    if is_given(row.get("tools")):
        return _objects(row["tools"], "tools") or None
    functions = _objects(row.get("functions"), "functions")
    return [{"type": "function", "function": function} for function in functions] or None


def read_list(value: Any, what: str) -> Sequence[Any]:
    """Return a list, which may be JSON text; an object is a list of one, nothing an empty one.

    Raises:
        UnusableRowError: the value is not a list; ``what`` names it.
    """
    value = _parse(value, what) if is_given(value) else []
    value = [value] if isinstance(value, dict) else value
    if value is not None and not isinstance(value, list):
        raise UnusableRowError(f"{what} is not a list")
    return value or []


def _extra(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a chat template reads beside the text, under the names of transformers."""
    extra: dict[str, Any] = {
        key: message[key] for key in _PASSED_KEYS if is_given(message.get(key))
    }
    if not all(is_unicode(str(value)) for value in extra.values()):
        raise UnusableRowError("text is not valid Unicode")
    reasoning = {message[key] for key in _REASONING_KEYS if _is_reasoning(message.get(key))}
    if len(reasoning) > 1:
        raise UnusableRowError("two different texts of reasoning in a turn")
    if reasoning:
        extra["reasoning_content"] = reasoning.pop()
    calls = message.get("tool_calls")
    if not is_given(calls) and is_given(message.get("function_call")):
        calls = [{"type": "function", "function": message["function_call"]}]
    if is_given(calls):
        extra["tool_calls"] = _calls(calls)
    return extra


def _is_reasoning(value: Any) -> bool:
    if value is not None and not (isinstance(value, str) and is_unicode(value)):
        raise UnusableRowError("reasoning is not text")
    return bool(value and value.strip())


def _calls(value: Any) -> list[Any]:
    """Return tool calls whose arguments are objects, as templates expect.

    OpenAI writes arguments as JSON in a string.
    """
    calls = []
    for call in _objects(value, "tool_calls"):
        holder = call.get("function") if isinstance(call.get("function"), dict) else call
        arguments = holder.get("arguments")
        if isinstance(arguments, str):
            with suppress(ValueError):  # other text is passed to the template unchanged
                arguments = plain_json(arguments)
            holder = {**holder, "arguments": arguments}
        calls.append({**call, "function": holder} if "function" in call else holder)
    if not calls:
        raise UnusableRowError("tool_calls is empty")
    return calls


def _objects(value: Any, what: str) -> list[Any]:
    """Return a list of objects as plain JSON; the list and each object may be JSON text."""
    found = [_parse(item, what) for item in read_list(value, what)]
    if not all(isinstance(item, dict) for item in found):
        raise UnusableRowError(f"{what} is not a list of objects")
    try:
        text = json.dumps(found, ensure_ascii=False, default=str)
        plain: list[Any] = plain_json(text)
    except (RecursionError, TypeError, ValueError):
        raise UnusableRowError(f"{what} is nested too deeply, or is not JSON") from None
    if not is_unicode(text):
        raise UnusableRowError("text is not valid Unicode")
    return plain


def _parse(value: Any, what: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except (ValueError, RecursionError):
        raise UnusableRowError(f"{what} is neither a list nor JSON") from None


def _text(content: Any, place: str) -> str:
    """Return the text of a message: a string, or parts of text, which are joined."""
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
                fix="remove such rows, or such parts if the text stands by itself",
            )
        if kind is None or not isinstance(part.get("text"), str):
            raise UnusableRowError("a part of a turn is not text")
        texts.append(part["text"])
    return "".join(texts)
