"""OpenAssistant messages out of the records of an export, nested or flat, faults noted.

Three shapes are read, and a file may mix them: a tree (``message_tree_id``, ``tree_state``,
``prompt`` with nested ``replies``); a message (``message_id``, ``parent_id``, ...); a message with
its replies nested in it, which is what the files called "messages" also hold: the root of a tree
without the tree's envelope.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

from sparsegrad_cli.data.conversation import Role
from sparsegrad_cli.data.text_files import is_text

_ROLES: dict[str, Role] = {"prompter": "user", "assistant": "assistant"}
NO_MESSAGE = "neither a tree nor a message"
DELETED = "deleted"
REJECTED = "rejected by review"
_NAMELESS = "\udfff"  # begins the name of a message without an id: no id holds a lone surrogate
_SAYS_ITSELF = "\udffe"  # in place of a parent: read it from the message


@dataclass(frozen=True, slots=True)
class Source:
    """Where a record stands: its place in words, and the split its source puts it into."""

    place: str
    split: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One message.

    Attributes:
        id, parent: as in the source; a message without an id gets one that no file can hold.
        role: ``user`` for a prompter.
        lang: language tag, None where not given.
        rank: among its siblings, 0 the best; None where not given.
        quality: label, 0 to 1; None where not given.
        tree, state: of the tree it says it is in; None where not given.
        fault: why it cannot be used, None where it can.
        remarks: what about it was damaged and is read as not given.
    """

    id: str
    parent: str | None
    text: str
    role: Role
    source: Source
    lang: str | None = None
    rank: int | None = None
    quality: float | None = None
    tree: str | None = None
    state: str | None = None
    fault: str | None = None
    remarks: tuple[str, ...] = ()


def messages_of(record: Any, source: Source) -> Iterator[Message]:
    """Every message of one record, parents before their replies, siblings in order.

    A message that is damaged comes with its ``fault``, so that what hangs below it can be told.
    """
    first, is_root = _topmost(record)
    # A list of what is left to read, with the parent that nesting says: replies may be nested
    # thousands deep. _SAYS_ITSELF: the message's own parent_id counts.
    left: list[tuple[Any, str | None]] = [(first, None if is_root else _SAYS_ITSELF)]
    number = 0
    while left:
        item, parent = left.pop()
        number += 1
        message = _message(item, parent, f"{_NAMELESS}{source.place}:{number}", source)
        yield message
        replies = item.get("replies") if isinstance(item, dict) else None
        if isinstance(replies, list):
            left.extend((reply, message.id) for reply in reversed(replies))
        elif replies is not None:
            number += 1
            name = f"{_NAMELESS}{source.place}:{number}"
            yield _faulty(name, message.id, source, "replies that are not a list")


def _topmost(record: Any) -> tuple[Any, bool]:
    """The record's topmost message, and whether it must be the root of a tree."""
    if not isinstance(record, dict) or "message_id" in record:
        return record, False
    prompt = record.get("prompt")
    if not isinstance(prompt, dict):
        return record, False
    of_tree = {key: record.get(key) for key in ("message_tree_id", "tree_state")}
    return prompt | {key: prompt.get(key) or value for key, value in of_tree.items()}, True


def _faulty(name: str, parent: str | None, source: Source, fault: str) -> Message:
    return Message(name, parent, "", "user", source, fault=fault)


def _message(item: Any, parent: str | None, spare_name: str, source: Source) -> Message:
    """The message in ``item``; ``parent`` as nesting says, or _SAYS_ITSELF."""
    nested = parent != _SAYS_ITSELF
    own = item.get("parent_id") if isinstance(item, dict) else None
    if not nested:
        parent = own if _is_id(own) else None
    if not isinstance(item, dict) or not (nested or "message_id" in item):
        tree = isinstance(item, dict) and _is_id(item.get("message_tree_id"))
        what = "not an object" if nested else "tree without a prompt" if tree else NO_MESSAGE
        return _faulty(spare_name, parent, source, what)
    name = item.get("message_id")
    if not _is_id(name):
        return _faulty(spare_name, parent, source, "no message_id")
    fault = _fault(item)
    if own is not None and not _is_id(own):
        fault = "parent_id is not an id"
    elif nested and own is not None and own != parent:
        fault = "parent_id is not the message it hangs below"
    if not isinstance(item.get("text"), str):
        return _faulty(name, parent, source, fault or "")
    message = Message(
        id=name,
        parent=parent,
        text=item["text"],
        role=_ROLES.get(str(item.get("role")), "user"),
        source=source,
        tree=item.get("message_tree_id"),
        fault=fault,
    )
    return _with_extras(message, item)


def _is_id(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and bool(value) and is_text(value)


def _fault(item: dict[str, Any]) -> str | None:
    """Why a message with an id cannot be used, damage first."""
    text, role, tree = item.get("text"), item.get("role"), item.get("message_tree_id")
    if not isinstance(text, str):
        return "text is missing or not text"
    if not is_text(text):
        return "text is not valid Unicode"
    if not isinstance(role, str) or role not in _ROLES:
        return "role is neither prompter nor assistant"
    if tree is not None and not _is_id(tree):
        return "message_tree_id is not an id"
    for key in ("deleted", "review_result"):
        if item.get(key) not in (True, False, None):
            return f"{key} is neither true nor false"
    if item.get("deleted"):
        return DELETED
    if item.get("review_result") not in (True, None):
        return REJECTED
    return None if text.strip() else "empty text"


def _with_extras(message: Message, item: dict[str, Any]) -> Message:
    """The message with what filters look at; damage there costs the value, not the message."""
    remarks: list[str] = []
    words: dict[str, str | None] = {}
    for key in ("lang", "tree_state"):
        value = item.get(key)
        if value is not None and not (isinstance(value, str) and value):
            remarks.append(f"{key} that is no word")
            value = None
        words[key] = value
    rank, quality = item.get("rank"), _quality(item.get("labels"))
    if rank is not None and not (_is_number(rank) and rank == int(rank)):
        remarks.append("rank that is no whole number")
        rank = None
    if quality is not None and not _is_number(quality):
        remarks.append("quality that is no number")
        quality = None
    return replace(
        message,
        lang=words["lang"],
        state=words["tree_state"],
        rank=None if rank is None else int(rank),
        quality=quality,
        remarks=tuple(remarks),
    )


def _is_number(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))


def _quality(labels: Any) -> Any:
    """The quality label in any of its three shapes, whatever it is; None where there is none.

    Exports: ``{"quality": {"value": v, "count": n}, ...}``. The hub: ``{"name": [...], "value":
    [...], ...}``, or a list of ``{"name": ..., "value": ...}``.
    """
    if isinstance(labels, list):
        named = [each for each in labels if isinstance(each, dict)]
        return next((each.get("value") for each in named if each.get("name") == "quality"), None)
    if not isinstance(labels, dict):
        return labels  # None, or damage that the caller remarks on
    if "quality" in labels:
        quality = labels["quality"]
        return quality.get("value") if isinstance(quality, dict) else quality
    names, values = labels.get("name"), labels.get("value")
    if isinstance(names, list) and isinstance(values, list) and "quality" in names:
        at = names.index("quality")
        return values[at] if at < len(values) else None
    return None
