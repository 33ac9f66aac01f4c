"""One row of a chat file to turns: ``messages``, ``prompt``/``completion``, Alpaca's columns."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from sparsegrad_cli.data.conversation import Role, Turn
from sparsegrad_cli.data.json_files import parse_json
from sparsegrad_cli.data.text_files import is_unicode
from sparsegrad_cli.errors import DataError

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",  # OpenAI's newer name for it
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
# The columns that make a table one of this kind.
KINDS = {"prompt_completion": ("prompt", "completion"), "instruction": ("instruction", "output")}
# Where a message keeps its role and its text: the chat API's way, and ShareGPT's.
_KEYS = (("role", "content"), ("from", "value"))
# Keys that say whether a message is learnt: OpenAI's and Mistral's, Axolotl's, ms-swift's, others.
_LOSS = ("weight", "loss_weight", "train", "training", "trainable", "loss", "loss_mask")
# Keys by which a row says it of all its turns, by one value or by a list. Under the other names of
# _LOSS a number such as ``loss: 2.31`` describes the row.
_ROW_LOSS = ("weight", "weights", "loss_weight", "loss_weights", "sample_weight", "loss_mask")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_PASSED = ("name", "tool_call_id")
_SPEAKS = {"tool_calls", "reasoning_content"}  # what a turn may say without any text
_SYSTEM = ("system", "system_prompt")
_TOOLS = ("tools", "functions")
_ROW_KEYS = (*_SYSTEM, *_TOOLS, *_ROW_LOSS, *_LOSS)
_COLUMNS = {
    "prompt_completion": KINDS["prompt_completion"],
    "instruction": ("instruction", "input", "output", "history"),
}
_SAYS = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}


class UnusableRowError(Exception):
    """A row that cannot be learnt from; the message is the reason, for the counts."""


@dataclass(frozen=True)
class ChatRow:
    """What a row says.

    Attributes:
        turns: as a conversation may have them, see :func:`settled`.
        tools: JSON schemas of the tools that the assistant may call, or None.
        counts: what was cut or masked, in words.
    """

    turns: tuple[Turn, ...]
    tools: list[Any] | None
    counts: dict[str, int]


@dataclass
class RowReader:
    """Reads the rows of a table.

    Args:
        kind: ``messages``: every turn of the assistant is learnt; ``prompt_completion``: texts or
            lists of messages, of which only the completion is learnt; ``instruction``: Alpaca's
            ``instruction``, ``input`` (may be empty or missing) and ``output``, after the turns of
            ``history`` where a row has some.
        column: of messages.
        typed: the table is from Arrow, see :class:`Table`. A column that nothing uses is not read.

    Attributes:
        unused: keys of rows and of messages that nothing reads, and how many have each.
    """

    kind: str
    column: str = "messages"
    typed: bool = False
    unused: dict[str, Counter[str]] = field(
        default_factory=lambda: {"rows": Counter(), "messages": Counter()}
    )
    _masked: int = 0

    def read(self, row: Mapping[str, Any], place: str) -> ChatRow:
        """The conversation of a row.

        Raises:
            UnusableRowError: it is damaged.
            DataError: a part that is not text, or a loss weight that is neither 0 nor 1.
        """
        self._masked = 0
        own = _COLUMNS.get(self.kind, (self.column,))
        cells = {key: row[key] for key in (*own, *_ROW_KEYS) if key in row}
        if self.typed:
            cells = _without_nulls(cells)
        if self.kind == "messages":
            turns = self._messages(cells.get(self.column), place, learn=True)
        elif self.kind == "prompt_completion":
            turns = self._completion(cells, place)
        else:
            turns = self._instruction(cells, place)
        loss = [key for key in dict.fromkeys((*_ROW_LOSS, *_LOSS)) if _says_loss(key, cells)]
        for key in loss:
            turns = self._marked(turns, key, cells[key], place)
        # Of two names for one thing the first that says something counts.
        first = [[key for key in keys if _given(cells.get(key))][:1] for keys in (_SYSTEM, _TOOLS)]
        for key in row.keys() - {*own, *first[0], *first[1], *loss}:
            self.unused["rows"][key] += (
                _given(cells.get(key)) if key in _ROW_KEYS else self.typed or _given(row[key])
            )
        system = cells[first[0][0]] if first[0] else None
        if self._masked and not any(turn.learn for turn in turns):
            raise UnusableRowError("every answer has a loss weight of 0")
        settled_turns, counts = settled(turns, system)
        if self._masked:
            counts["answers with a loss weight of 0, not learnt"] = self._masked
        return ChatRow(settled_turns, _tools(cells), counts)

    def _completion(self, row: Mapping[str, Any], place: str) -> list[Turn]:
        turns: list[Turn] = []
        for key, role in (("prompt", "user"), ("completion", "assistant")):
            value = row.get(key)
            if isinstance(value, str):
                value = [{"role": role, "content": value}]
            turns += self._messages(value, place, learn=key == "completion")
        return turns

    def _instruction(self, row: Mapping[str, Any], place: str) -> list[Turn]:
        """The turns of the history, then the instruction, its input after a blank line."""
        for key in ("instruction", "input", "output"):
            value = row.get(key)
            if not isinstance(value, str) and not (key == "input" and value is None):
                raise UnusableRowError(f"{key} is missing or not text")
        question = row["instruction"]
        if (row.get("input") or "").strip():
            question = f"{question}\n\n{row['input']}"
        said: list[Any] = []
        for pair in _listed(row.get("history"), "history"):
            if isinstance(pair, dict):
                said.append(pair)
            elif isinstance(pair, list) and len(pair) == 2:
                said += [{"role": r, "content": t} for r, t in zip(_SPEAKERS, pair, strict=True)]
            else:
                raise UnusableRowError("history is not a list of pairs of texts")
        said += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": row["output"]},
        ]
        return self._messages(said, place, learn=True)

    def _messages(self, value: Any, place: str, *, learn: bool) -> list[Turn]:
        if not isinstance(value, list):
            raise UnusableRowError("the turns are missing or not a list")
        return [
            self._message(message, place, number, learn=learn)
            for number, message in enumerate(value, start=1)
        ]

    def _message(self, message: Any, place: str, number: int, *, learn: bool) -> Turn:
        if not isinstance(message, dict):
            raise UnusableRowError("a turn is not an object")
        keys = next((keys for keys in _KEYS if message.get(keys[0]) is not None), _KEYS[0])
        said = message.get(keys[0])
        role = ROLES.get(said.lower()) if isinstance(said, str) else None
        if role is None:
            raise UnusableRowError("a role that is not system, user, assistant or tool")
        content, extra = message.get(keys[1]), _extra(message)
        if str(said).lower() == "function_call":
            content, extra["tool_calls"] = None, _calls(content)
        if content is None and _SPEAKS & extra.keys():
            content = ""
        turn = Turn(role, _text(content, place), learn and role == "assistant", extra)
        if not is_unicode(turn.text):
            raise UnusableRowError("text is not valid Unicode")
        loss = [key for key in _LOSS if _given(message.get(key))]
        for key in loss:
            turn = self._asked(turn, f"{key} of message {number}", message[key], place)
        if len({_SAYS.get(str(message[key]).lower()) for key in loss}) > 1:
            both = " and ".join(f"{key}: {message[key]}" for key in loss)
            raise DataError(
                f"message {number} says both {both}",
                where=place,
                fix="leave one of them",
            )
        known = {*keys, *_LOSS, *_REASONING, *_PASSED, "tool_calls", "function_call"}
        for key in message.keys() - known:
            self.unused["messages"][key] += _given(message[key])
        return turn

    def _marked(self, turns: list[Turn], key: str, value: Any, place: str) -> list[Turn]:
        """The turns as a loss key of their row says: of all of them, of each, or of each answer."""
        answers = [at for at, turn in enumerate(turns) if turn.role == "assistant"]
        if not isinstance(value, list):
            off = _says(f"{key} of the row", value, place) is False
            return [self._asked(t, key, 0, place) if off and t.learn else t for t in turns]
        if len(value) not in (len(turns), len(answers)):
            raise DataError(
                f"{key} has {len(value)} values for {len(turns)} turns, {len(answers)} of them of "
                "the assistant",
                where=place,
                fix="give one value to every turn or to every turn of the assistant",
            )
        marked = list(turns)
        of = answers if len(value) == len(answers) else range(len(turns))
        for at, one in zip(of, value, strict=True):
            marked[at] = self._asked(turns[at], f"{key} of message {at + 1}", one, place)
        return marked

    def _asked(self, turn: Turn, what: str, value: Any, place: str) -> Turn:
        """The turn as its loss key asks; ``what`` names the key and the message."""
        learn = _says(what, value, place)
        if learn and turn.role != "assistant":
            raise DataError(
                f"{what} asks for a turn of the {turn.role} to be learnt, and only an assistant's "
                "can be",
                where=place,
                fix="set it to 0 there, or take it out",
            )
        self._masked += turn.learn and not learn
        return replace(turn, learn=learn)


_SPEAKERS = ("user", "assistant")


def settled(turns: list[Turn], system: Any) -> tuple[tuple[Turn, ...], dict[str, int]]:
    """The turns as a conversation may have them, and what was cut.

    An optional system turn first, then user and assistant by turns, the last one learnt. Turns of
    tools stand between two of the assistant. What follows the last learnt turn is cut, and so is
    an empty system turn.

    Args:
        turns: as they stand in the row.
        system: the row's own ``system`` column: text that goes first, or None.

    Raises:
        UnusableRowError: they cannot be put so.
    """
    cut: dict[str, int] = {}
    if system is not None and not isinstance(system, str):
        raise UnusableRowError("system is not text")
    if system is not None and system.strip():
        if not is_unicode(system):
            raise UnusableRowError("text is not valid Unicode")
        turns = [Turn("system", system), *turns]
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
        # A call may stand alone, and a tool may return nothing.
        if not turn.text.strip() and not _SPEAKS & turn.extra.keys() and turn.role != "tool":
            raise UnusableRowError("a turn is empty")
        if turn.role == "system" and at > 0:
            raise UnusableRowError("a system turn that is not the first")
    spoken = [turn.role for turn in turns if turn.role != "system"]
    if spoken[0] != "user":
        raise UnusableRowError(f"begun by the {spoken[0]}")
    if any(one == other != "tool" for one, other in pairwise(spoken)):
        raise UnusableRowError("two turns of one role in a row")
    if any(pair == ("user", "tool") for pair in pairwise(spoken)):
        raise UnusableRowError("a tool's turn that follows no turn of the assistant")
    return tuple(turns), cut


def _without_nulls(value: Any) -> Any:
    """The value without the keys that Arrow adds to an object because another one has them."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _given(value: Any) -> bool:
    """Whether a key says anything."""
    return value is not None and value != "" and value != [] and value != {}


# --- what is learnt


def _says_loss(key: str, row: Mapping[str, Any]) -> bool:
    """Whether this key of a row says what is learnt of it."""
    value = row.get(key)
    if key in _ROW_LOSS or isinstance(value, list):
        return _given(value)
    return str(value).lower() in _SAYS


def _says(what: str, value: Any, place: str) -> bool:
    """Whether a loss key asks for its turn to be learnt.

    Raises:
        DataError: the value is neither 0 nor 1.
    """
    said = _SAYS.get(str(value).lower())
    if said is None:
        raise DataError(
            f"{what} is {value!r}, expected 0 or 1 (false or true): a turn is learnt or it is not",
            where=place,
            fix="round it to 0 or 1, or take the key out",
        )
    return said


# --- tools and reasoning


def _extra(message: Mapping[str, Any]) -> dict[str, Any]:
    """What a message has beside its text that a chat template reads, under transformers' names."""
    extra: dict[str, Any] = {key: message[key] for key in _PASSED if _given(message.get(key))}
    if not all(is_unicode(str(value)) for value in extra.values()):
        raise UnusableRowError("text is not valid Unicode")
    reasoning = {message[key] for key in _REASONING if _is_thought(message.get(key))}
    if len(reasoning) > 1:
        raise UnusableRowError("two different texts of reasoning in a turn")
    if reasoning:
        extra["reasoning_content"] = reasoning.pop()
    calls = message.get("tool_calls")
    if not _given(calls) and _given(message.get("function_call")):
        calls = [{"type": "function", "function": message["function_call"]}]
    if _given(calls):
        extra["tool_calls"] = _calls(calls)
    return extra


def _is_thought(value: Any) -> bool:
    if value is not None and not (isinstance(value, str) and is_unicode(value)):
        raise UnusableRowError("reasoning is not text")
    return bool(value and value.strip())


def _calls(value: Any) -> list[Any]:
    """Calls of tools, their arguments as the objects that templates write out.

    OpenAI's arguments are JSON in a string.
    """
    calls = []
    for call in _objects([value] if isinstance(value, dict) else value, "tool_calls"):
        holder = call.get("function") if isinstance(call.get("function"), dict) else call
        arguments = holder.get("arguments")
        if isinstance(arguments, str):
            with suppress(ValueError, RecursionError):  # other text is passed on as it is
                arguments = json.loads(arguments)
            holder = {**holder, "arguments": arguments}
        calls.append({**call, "function": holder} if "function" in call else holder)
    if not calls:
        raise UnusableRowError("tool_calls is empty")
    return calls


def _tools(row: Mapping[str, Any]) -> list[Any] | None:
    """The tools of a row: ``tools``, or ``functions`` as OpenAI called them at first."""
    if _given(row.get("tools")):
        return _objects(row["tools"], "tools") or None
    functions = _objects(row.get("functions"), "functions")
    return [{"type": "function", "function": function} for function in functions] or None


def _objects(value: Any, what: str) -> list[Any]:
    """A list of objects, which may be JSON text, as may each of them."""
    found = [_parsed(item, what) for item in _listed(value, what)]
    if not all(isinstance(item, dict) for item in found):
        raise UnusableRowError(f"{what} is not a list of objects")
    try:
        text = json.dumps(found, ensure_ascii=False, default=str)
    except (RecursionError, TypeError):
        raise UnusableRowError(f"{what} cannot be written as JSON") from None
    if not is_unicode(text):
        raise UnusableRowError("text is not valid Unicode")
    plain: list[Any] = json.loads(text)
    return plain


def _listed(value: Any, what: str) -> Sequence[Any]:
    """A list, which may be JSON text; empty where nothing is said."""
    value = _parsed(value, what) if _given(value) else []
    value = [value] if isinstance(value, dict) else value
    if value is not None and not isinstance(value, list):
        raise UnusableRowError(f"{what} is not a list")
    return value or []


def _parsed(value: Any, what: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except ValueError:
        raise UnusableRowError(f"{what} is neither a list nor JSON") from None


# --- text


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
