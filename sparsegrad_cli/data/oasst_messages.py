"""Extract OpenAssistant messages from the records of an export, nested or flat.

Three shapes are read, and a file may mix them: a tree (``message_tree_id``, ``tree_state``,
``prompt`` with nested ``replies``); a message (``message_id``, ``parent_id``, ...); a message with
nested ``replies``, which is the root of a tree without the tree's envelope.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

from sparsegrad_cli.data.conversation import Role
from sparsegrad_cli.data.text_files import is_unicode

NOT_A_MESSAGE = "neither a tree nor a message"
DELETED = "deleted"
REJECTED = "rejected by review"

_ROLES: dict[str, Role] = {"prompter": "user", "assistant": "assistant"}
# A message without an id gets a name that begins so: no id holds a lone surrogate.
_WITHOUT_ID = "\udfff"


@dataclass(frozen=True, slots=True)
class Source:
    """Where a record comes from: its place in the file, and the split of the file."""

    place: str
    split: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One message.

    Attributes:
        id: as in the source; a message without an id gets a name that no file can hold.
        parent: id of the message that it answers; None for the root of a tree.
        text: what it says.
        role: ``user`` for a prompter.
        source: where it comes from.
        lang: language tag.
        rank: rank among its siblings, 0 is best.
        quality: quality label, 0 to 1.
        tree: id of its tree.
        state: state of its tree.
        fault: why it cannot be used; None if it can.
        unusable: which of its other values were damaged and are read as missing.
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
    unusable: tuple[str, ...] = ()


def messages_of(record: Any, source: Source) -> Iterator[Message]:
    """Yield every message of one record, parents before their replies, siblings in order.

    A damaged message is yielded with its ``fault``, so that the messages below it are found.
    """
    topmost, is_tree = _topmost(record)
    # (message, its parent by nesting, whether nesting decides its parent)
    left: list[tuple[Any, str | None, bool]] = [(topmost, None, is_tree)]
    number = 0
    while left:
        item, parent, nested = left.pop()
        number += 1
        message = _message(item, parent, nested, f"{_WITHOUT_ID}{source.place}:{number}", source)
        yield message
        replies = item.get("replies") if isinstance(item, dict) else None
        if isinstance(replies, list):
            left.extend((reply, message.id, True) for reply in reversed(replies))
        elif replies is not None:
            number += 1
            name = f"{_WITHOUT_ID}{source.place}:{number}"
            yield _faulty(name, message.id, source, "replies is not a list")


def _topmost(record: Any) -> tuple[Any, bool]:
    """Return the record's topmost message, and whether the record is a tree."""
    if not isinstance(record, dict) or "message_id" in record:
        return record, False
    prompt = record.get("prompt")
    if not isinstance(prompt, dict):
        return record, False
    of_tree = {key: record.get(key) for key in ("message_tree_id", "tree_state")}
    return prompt | {key: prompt.get(key) or value for key, value in of_tree.items()}, True


def _message(
    item: Any, parent: str | None, nested: bool, name_without_id: str, source: Source
) -> Message:
    """Make a message of ``item``; its own ``parent_id`` counts only if it is not nested."""
    own_parent = item.get("parent_id") if isinstance(item, dict) else None
    if not nested:
        parent = own_parent if _is_id(own_parent) else None
    if not isinstance(item, dict) or not (nested or "message_id" in item):
        is_tree = isinstance(item, dict) and _is_id(item.get("message_tree_id"))
        what = "not an object" if nested else "tree without a prompt" if is_tree else NOT_A_MESSAGE
        return _faulty(name_without_id, parent, source, what)
    name, text = item.get("message_id"), item.get("text")
    if not _is_id(name):
        return _faulty(name_without_id, parent, source, "no message_id")
    fault = _fault(item)
    if own_parent is not None and not _is_id(own_parent):
        fault = "parent_id is not an id"
    elif nested and own_parent is not None and own_parent != parent:
        fault = "parent_id is not the message above it"
    if not isinstance(text, str):
        return _faulty(name, parent, source, fault or "")
    role = _ROLES.get(str(item.get("role")), "user")
    tree = item.get("message_tree_id")
    message = Message(name, parent, text, role, source, tree=tree, fault=fault)
    return replace(message, **_filter_values(item))


def _faulty(name: str, parent: str | None, source: Source, fault: str) -> Message:
    return Message(name, parent, "", "user", source, fault=fault)


def _is_id(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and bool(value) and is_unicode(value)


def _fault(item: Mapping[str, Any]) -> str | None:
    """Return why a message with an id cannot be used; damage comes first."""
    text, role, tree = item.get("text"), item.get("role"), item.get("message_tree_id")
    if not isinstance(text, str):
        return "text is missing or not text"
    if not is_unicode(text):
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


def _filter_values(item: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that filters use; a damaged one is missing, and ``unusable`` names it."""
    quality = _quality(item.get("labels"))
    rank, lang, state = item.get("rank"), item.get("lang"), item.get("tree_state")
    usable = {
        "lang that is not text": lang is None or (isinstance(lang, str) and lang != ""),
        "tree_state that is not text": state is None or (isinstance(state, str) and state != ""),
        "rank that is not a whole number": rank is None or (_is_number(rank) and rank == int(rank)),
        "quality that is not a number": quality is None or _is_number(quality),
    }
    is_lang, is_state, is_rank, is_quality = usable.values()
    return {
        "lang": lang if is_lang else None,
        "state": state if is_state else None,
        "rank": int(rank) if is_rank and rank is not None else None,
        "quality": quality if is_quality else None,
        "unusable": tuple(what for what, is_usable in usable.items() if not is_usable),
    }


def _is_number(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))


def _quality(labels: Any) -> Any:
    """Return the quality label, whatever it is, from any of its three shapes; None if missing.

    Exports: ``{"quality": {"value": v, "count": n}, ...}``. The hub: ``{"name": [...], "value":
    [...], ...}``, or a list of ``{"name": ..., "value": ...}``.
    """
    if isinstance(labels, list):
        named = [each for each in labels if isinstance(each, dict)]
        return next((each.get("value") for each in named if each.get("name") == "quality"), None)
    if not isinstance(labels, dict):
        return labels  # None, or damage
    if "quality" in labels:
        quality = labels["quality"]
        return quality.get("value") if isinstance(quality, dict) else quality
    names, values = labels.get("name"), labels.get("value")
    if isinstance(names, list) and isinstance(values, list) and "quality" in names:
        at = names.index("quality")
        return values[at] if at < len(values) else None
    return None
