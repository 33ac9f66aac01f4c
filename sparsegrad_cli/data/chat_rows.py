"""Turn one row of a chat file into turns, and settle which of them are learnt."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from sparsegrad_cli.data.chat_messages import (
    LOSS_KEYS,
    UnusableRowError,
    is_empty,
    is_given,
    is_learnt,
    is_loss_value,
    read_list,
    read_message,
    read_tools,
)
from sparsegrad_cli.data.conversation import Conversation, Turn
from sparsegrad_cli.data.tables import Table
from sparsegrad_cli.data.text_files import is_unicode
from sparsegrad_cli.errors import DataError

# The columns that make a table one of this kind.
KINDS = {"prompt_completion": ("prompt", "completion"), "instruction": ("instruction", "output")}

_COLUMNS = {
    "prompt_completion": KINDS["prompt_completion"],
    "instruction": ("instruction", "input", "output", "history"),
}
_SYSTEM_KEYS = ("system", "system_prompt")
_TOOL_KEYS = ("tools", "functions")
# Keys by which a row says what is learnt of all its turns, by one value or by a list. Under other
# names of LOSS_KEYS, a number such as ``loss: 2.31`` describes the row.
_ROW_LOSS_KEYS = (
    *("weight", "weights", "loss_weight", "loss_weights", "sample_weight", "loss_mask"),
)
_ALL_LOSS_KEYS = tuple(dict.fromkeys((*_ROW_LOSS_KEYS, *LOSS_KEYS)))
_ROW_KEYS = (*_SYSTEM_KEYS, *_TOOL_KEYS, *_ALL_LOSS_KEYS)


@dataclass
class RowReader:
    """Read the rows of a table.

    Args:
        table: the table.
        kind: ``messages``: every turn of the assistant is learnt; ``prompt_completion``: texts or
            lists of messages, of which only the completion is learnt; ``instruction``: Alpaca's
            ``instruction``, ``input`` (may be empty or missing) and ``output``, after the turns of
            ``history``.
        column: column of the messages.

    Attributes:
        unused: ``rows`` and ``messages`` -> keys that nothing reads, and how many have each.
    """

    table: Table
    kind: str
    column: str = "messages"
    unused: dict[str, Counter[str]] = field(
        default_factory=lambda: {"rows": Counter(), "messages": Counter()}
    )
    _masked: int = 0

    def read(self, at: int) -> tuple[Conversation, dict[str, int]]:
        """Return the conversation of row ``at``, and how often something was cut or masked.

        Its group is a hash of its first prompt: rows that answer the same prompt belong together.

        Raises:
            UnusableRowError: the row is damaged.
            DataError: a part is not text, or a loss weight is neither 0 nor 1.
        """
        self._masked = 0
        columns, place = self.table.columns, self.table.place(at)
        own = _COLUMNS.get(self.kind, (self.column,))
        cells = {key: columns[key][at] for key in (*own, *_ROW_KEYS) if key in columns}
        if self.table.typed:
            cells = _without_nulls(cells)
        if self.kind == "messages":
            turns = self._messages(cells.get(self.column), place, learn=True)
        elif self.kind == "prompt_completion":
            turns = self._completion(cells, place)
        else:
            turns = self._instruction(cells, place)
        loss_keys = [key for key in _ALL_LOSS_KEYS if _says_what_is_learnt(key, cells)]
        for key in loss_keys:
            turns = self._masked_turns(turns, key, cells[key], place)
        # Of two names for one thing, the first that says something counts.
        system, tools = (
            next((key for key in keys if is_given(cells.get(key))), None)
            for keys in (_SYSTEM_KEYS, _TOOL_KEYS)
        )
        for key in columns.keys() - {*own, *loss_keys, system, tools}:
            self.unused["rows"][key] += (
                is_given(cells.get(key))
                if key in _ROW_KEYS
                else self.table.typed or is_given(columns[key][at])
            )
        if self._masked and not any(turn.learn for turn in turns):
            raise UnusableRowError("every answer has a loss weight of 0")
        valid, counts = _valid_turns(turns, cells[system] if system else None)
        if self._masked:
            counts["answers with a loss weight of 0, not learnt"] = self._masked
        prompt = next(turn.text for turn in valid if turn.role == "user")
        group = hashlib.sha256(prompt.encode()).hexdigest()[:32]
        return Conversation(valid, group, read_tools(cells), place), counts

    def _completion(self, row: Mapping[str, Any], place: str) -> list[Turn]:
        turns: list[Turn] = []
        for key, role in (("prompt", "user"), ("completion", "assistant")):
            value = row.get(key)
            if isinstance(value, str):
                value = [{"role": role, "content": value}]
            turns += self._messages(value, place, learn=key == "completion")
        return turns

    def _instruction(self, row: Mapping[str, Any], place: str) -> list[Turn]:
        """Return the turns of the history, then the instruction, its input after a blank line."""
        for key in ("instruction", "input", "output"):
            value = row.get(key)
            if not isinstance(value, str) and not (key == "input" and value is None):
                raise UnusableRowError(f"{key} is missing or not text")
        question = row["instruction"]
        if (row.get("input") or "").strip():
            question = f"{question}\n\n{row['input']}"
        messages: list[Any] = []
        for pair in read_list(row.get("history"), "history"):
            if isinstance(pair, dict):
                messages.append(pair)
            elif isinstance(pair, list) and len(pair) == 2:
                messages += _messages_of_pair(*pair)
            else:
                raise UnusableRowError("history is not a list of pairs of texts")
        messages += _messages_of_pair(question, row["output"])
        return self._messages(messages, place, learn=True)

    def _messages(self, value: Any, place: str, *, learn: bool) -> list[Turn]:
        if not isinstance(value, list):
            raise UnusableRowError("the turns are missing or not a list")
        turns = []
        for number, item in enumerate(value, start=1):
            message = read_message(item, place, learn=learn)
            self.unused["messages"].update(message.unused)
            turn, said = message.turn, message.loss_values
            for key, one in said.items():
                turn = self._mask(turn, f"{key} of message {number}", one, place)
            if len({is_learnt(key, one, place) for key, one in said.items()}) > 1:
                both = " and ".join(f"{key}: {one}" for key, one in said.items())
                raise DataError(
                    f"message {number} says both {both}", where=place, fix="leave one of them"
                )
            turns.append(turn)
        return turns

    def _masked_turns(self, turns: list[Turn], key: str, value: Any, place: str) -> list[Turn]:
        """Apply a loss key of the row: a value for all turns, for each, or for each answer."""
        if not isinstance(value, list):
            off = not is_learnt(f"{key} of the row", value, place)
            return [self._mask(t, key, 0, place) if off and t.learn else t for t in turns]
        answers = [at for at, turn in enumerate(turns) if turn.role == "assistant"]
        if len(value) not in (len(turns), len(answers)):
            raise DataError(
                f"{key} has {len(value)} values for {len(turns)} turns, {len(answers)} of them of "
                "the assistant",
                where=place,
                fix="give one value to every turn or to every turn of the assistant",
            )
        masked = list(turns)
        positions = answers if len(value) == len(answers) else range(len(turns))
        for at, one in zip(positions, value, strict=True):
            masked[at] = self._mask(turns[at], f"{key} of message {at + 1}", one, place)
        return masked

    def _mask(self, turn: Turn, what: str, value: Any, place: str) -> Turn:
        """Apply one loss value to a turn; ``what`` names the key and the message."""
        learn = is_learnt(what, value, place)
        if learn and turn.role != "assistant":
            raise DataError(
                f"{what} asks for a turn of the {turn.role} to be learnt, and only an assistant's "
                "can be",
                where=place,
                fix="set it to 0 there, or remove it",
            )
        self._masked += turn.learn and not learn
        return replace(turn, learn=learn)


def _valid_turns(turns: list[Turn], system: Any) -> tuple[tuple[Turn, ...], dict[str, int]]:
    """Return the turns as a conversation may have them, and counts of what was cut.

    An optional system turn comes first, then user and assistant alternate, and the last turn is
    learnt. Turns of tools stand between two of the assistant. What follows the last learnt turn is
    cut, and so is an empty system turn. ``system`` is the row's own text that goes first, or None.
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
    if any(map(is_empty, turns)):
        raise UnusableRowError("a turn is empty")
    if any(turn.role == "system" for turn in turns[1:]):
        raise UnusableRowError("a system turn that is not the first")
    roles = [turn.role for turn in turns if turn.role != "system"]
    if roles[0] != "user":
        raise UnusableRowError(f"begins with the {roles[0]}")
    if any(one == other != "tool" for one, other in pairwise(roles)):
        raise UnusableRowError("two turns of one role in a row")
    if any(pair == ("user", "tool") for pair in pairwise(roles)):
        raise UnusableRowError("a tool's turn that follows no turn of the assistant")
    return tuple(turns), cut


def _messages_of_pair(question: Any, answer: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _says_what_is_learnt(key: str, row: Mapping[str, Any]) -> bool:
    """Return whether this key of a row says which of its turns are learnt."""
    value = row.get(key)
    if key in _ROW_LOSS_KEYS or isinstance(value, list):
        return is_given(value)
    return is_loss_value(value)


def _without_nulls(value: Any) -> Any:
    """Remove the keys that Arrow adds to an object because another object has them."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value
