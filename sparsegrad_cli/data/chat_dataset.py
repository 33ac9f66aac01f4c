"""Conversations read from wherever they lie, and what becomes of them: limits, counts, hash."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sparsegrad_cli.data.conversation import ChatData, Conversation
from sparsegrad_cli.errors import DataError, UsageError


@dataclass(frozen=True)
class RawChat:
    """A chat data set before limits.

    Attributes:
        train, validation: conversations in source order; no group is in both.
        unit: what a group is, in the plural: ``trees``, ``prompts``, ``rows``.
        counts: what was read, dropped and kept, in an order that reads well.
        notes: what the user should know beyond them.
    """

    train: list[Conversation]
    validation: list[Conversation]
    unit: str
    counts: dict[str, int]
    notes: list[str] = field(default_factory=list)


def finish(
    raw: RawChat, train_limit: int | None, eval_limit: int | None, *, last_only: bool = False
) -> ChatData:
    """Apply the limits, count what is left, hash it.

    Args:
        last_only: learn the last answer of every conversation, and none before it.

    Raises:
        UsageError: a limit below 1.
        DataError: a split is empty.
    """
    counts, notes = dict(raw.counts), list(raw.notes)
    parts = {}
    for split, whole, key, limit in (
        ("training", raw.train, "train_limit", train_limit),
        ("validation", raw.validation, "eval_limit", eval_limit),
    ):
        if limit is not None and limit < 1:
            raise UsageError(f"{key} is {limit}, it must be at least 1", where=f"task.{key}")
        part = [_last_only(each) if last_only else each for each in whole[:limit]]
        if not part:
            why = f": {'; '.join(raw.notes)}" if raw.notes else ""
            raise DataError(f"there is no conversation for {split}{why}", where="task")
        if len(part) < len(whole):
            notes.append(f"{split} uses the first {len(part)} of {len(whole)} conversations")
        learnt, distinct = learnt_turns(part)
        counts[f"{split} {raw.unit}"] = len({each.group for each in part})
        counts[f"{split} conversations"] = len(part)
        counts[f"{split} assistant turns learnt"] = learnt
        counts[f"{split} assistant turns learnt, distinct"] = distinct
        parts[split] = part
    train, validation = parts["training"], parts["validation"]
    return ChatData(train, validation, counts, _hash(parts.values()), notes)


def _last_only(conversation: Conversation) -> Conversation:
    """The conversation with its last learnt turn as the only one."""
    *before, last = conversation.turns
    turns = (*(replace(turn, learn=False) if turn.learn else turn for turn in before), last)
    return replace(conversation, turns=turns)


def learnt_turns(conversations: Iterable[Conversation]) -> tuple[int, int]:
    """(learnt turns, distinct ones): two are the same if they and all before them are."""
    # A trie: a turn is known by the number of the one before it and what it says.
    numbers: dict[tuple[int, str, str, str], int] = {}
    learnt = 0
    seen: set[int] = set()
    for conversation in conversations:
        at = -1
        for turn in conversation.turns:
            said = (at, turn.role, turn.text, _json(turn.extra))
            at = numbers.setdefault(said, len(numbers))
            if turn.learn:
                learnt += 1
                seen.add(at)
    return learnt, len(seen)


def _hash(splits: Iterable[Sequence[Conversation]]) -> str:
    """sha256 (hex) over every turn with all that it says, whether it is learnt, and the tools.

    In order and by split.
    """
    sha = hashlib.sha256()
    for conversations in splits:
        # Counts and lengths first, so that no two sequences read alike when joined.
        sha.update(struct.pack("<q", len(conversations)))
        for conversation in conversations:
            sha.update(struct.pack("<q", len(conversation.turns)))
            for turn in conversation.turns:
                role, text = turn.role.encode(), turn.text.encode()
                sha.update(struct.pack("<qq?", len(role), len(text), turn.learn) + role + text)
                more = _json(turn.extra).encode()
                sha.update(struct.pack("<q", -len(more)) + more if more else b"")
            more = _json(conversation.tools).encode()
            sha.update(struct.pack("<q", -len(more)) + more if more else b"")
    return sha.hexdigest()


def _json(value: Any) -> str:
    """What a turn or a conversation has beside its texts; empty where it has nothing."""
    return json.dumps(value, sort_keys=True) if value else ""
