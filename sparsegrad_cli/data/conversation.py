"""Conversations: what they hold, which validate, limits and hash. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from sparsegrad_cli.data.mixing import Mixture
from sparsegrad_cli.errors import DataError, UsageError
from sparsegrad_cli.recipe.task_section import ChatSection, TaskSection

Role = Literal["system", "user", "assistant", "tool"]

_DEFAULT_FRACTION = TaskSection.model_fields["validation_fraction"].default


@dataclass(frozen=True)
class Turn:
    """One message.

    Attributes:
        role: role of the speaker.
        text: the text, unchanged from the source.
        learn: whether its tokens are labelled; only an assistant's can be.
        extra: other keys that the chat template reads: ``tool_calls``, ``tool_call_id``, ``name``,
            ``reasoning_content``.
    """

    role: Role
    text: str
    learn: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Conversation:
    """A sequence of turns that ends with a learnt one.

    Attributes:
        turns: the turns in order.
        group: conversations of one group (an OpenAssistant tree, a row of a file) share text, so
            they must stay in one split.
        tools: JSON schemas of the tools that the assistant may call, or None.
        place: ``file:line``; empty if unknown.
    """

    turns: tuple[Turn, ...]
    group: str
    tools: Sequence[Mapping[str, Any]] | None = field(default=None, hash=False)
    place: str = ""

    @property
    def where(self) -> str:
        """The place for an error message."""
        return self.place or f"conversation {self.group}"


@dataclass(frozen=True)
class ChatData:
    """A chat data set, split.

    Attributes:
        train: training conversations in source order. No group is in both splits.
        validation: validation conversations in source order.
        counts: what was kept and dropped -> how many: ``{"trees read": 100, ...}``.
        data_hash: sha256 (hex) over every turn that is used, in order and by split.
        notes: what the user should know beyond the counts.
        evaluation: name of a further evaluation set -> its conversations.
        mixture: which source each training conversation is from, with ``task.mix``.
    """

    train: list[Conversation]
    validation: list[Conversation]
    counts: Mapping[str, int]
    data_hash: str
    notes: list[str] = field(default_factory=list)
    evaluation: dict[str, list[Conversation]] = field(default_factory=dict)
    mixture: Mixture | None = None


class DropCounts:
    """Count what a reader drops, by reason, with the place where each reason was first met.

    Attributes:
        counts: reason -> number of cases, in the order in which the reasons were met.
        first: reason -> place of its first case.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def add(self, reason: str, place: str) -> None:
        """Count one more case of ``reason``."""
        self.counts[reason] += 1
        self.first.setdefault(reason, place)

    def listed(self, prefix: str = "") -> dict[str, int]:
        """Return the counts, largest first, with ``prefix`` before each reason."""
        ordered = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        return {f"{prefix}{reason}": count for reason, count in ordered}

    def note(self, reason: str) -> str:
        """Return the count and the first place of a reason."""
        return f"{self.counts[reason]} x {reason}; first: {self.first[reason]}"

    def sentence(self) -> str:
        """Return all reasons in one line: ``12 deleted, 3 empty text (first: a.jsonl:7)``."""
        parts = [
            f"{count} {reason} (first: {self.first[reason]})"
            for reason, count in self.listed().items()
        ]
        return "; ".join(parts) or "nothing was dropped"


@dataclass(frozen=True)
class RawChat:
    """A chat data set before limits.

    Attributes:
        train: training conversations in source order. No group is in both splits.
        validation: validation conversations in source order.
        unit: what a group is, in the plural: ``trees``, ``prompts``, ``rows``.
        counts: what was read, dropped and kept.
        notes: what the user should know beyond the counts.
        evaluation: name of a further evaluation set -> its conversations.
        mixture: which source each training conversation is from, with ``task.mix``.
    """

    train: list[Conversation]
    validation: list[Conversation]
    unit: str
    counts: dict[str, int]
    notes: list[str] = field(default_factory=list)
    evaluation: dict[str, list[Conversation]] = field(default_factory=dict)
    mixture: Mixture | None = None


def split_position(group: str) -> float:
    """Return a number in [0, 1) that depends on the group's name alone.

    It is the first 64 bits of sha256("validation\\\\n" + name) as a share of 2^64. It is the same
    on every platform, whatever the seed, the order and the other groups.
    """
    digest = hashlib.sha256(b"validation\n" + group.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_by_hash(
    conversations: Sequence[Conversation], fraction: float, unit: str
) -> tuple[list[Conversation], list[Conversation], str]:
    """Split conversations into training and validation by a hash of their groups' names.

    A group validates if its :func:`split_position` is below ``fraction``. So an added group moves
    no other group, and a larger fraction holds out the same groups and more. If one side would be
    empty, the nearest group changes sides.

    Args:
        conversations: conversations in source order, which both parts keep.
        fraction: share of the groups that validate, between 0 and 1.
        unit: what a group is, in the plural, for the note.

    Returns:
        Training conversations, validation conversations, and a note on the split.

    Raises:
        DataError: there is only one group.
    """
    groups = {each.group for each in conversations}
    ordered = sorted(groups, key=lambda group: (split_position(group), group))
    if len(ordered) < 2:
        raise DataError(
            f"Expected at least two {unit} to split into training and validation, got one",
            where="task",
            fix="add more data, or use a folder with train and validation files",
        )
    below = sum(split_position(group) < fraction for group in ordered)
    count = min(max(below, 1), len(ordered) - 1)
    note = (
        f"{count} of {len(ordered)} {unit} validate, chosen by a hash of each "
        f"(validation_fraction {fraction:g})"
    )
    if count != below:
        side = "validation" if below == 0 else "training"
        note += f"; {side} would have been empty, so the nearest one was moved there"
    chosen = set(ordered[:count])
    train = [each for each in conversations if each.group not in chosen]
    return train, [each for each in conversations if each.group in chosen], note


def refuse_fraction(task: TaskSection) -> None:
    """Refuse ``validation_fraction`` for data that has a validation part.

    Raises:
        UsageError: the fraction differs from the default, so a user has set it.
    """
    if task.validation_fraction != _DEFAULT_FRACTION:
        raise UsageError(
            f"validation_fraction {task.validation_fraction:g} has no effect: the data has a "
            "validation part",
            where="task.validation_fraction",
            fix="leave it out, or set task.path to the training file alone",
        )


def finish(raw: RawChat, task: TaskSection) -> ChatData:
    """Apply ``train_on`` and the limits of a recipe, count what is left, and hash it.

    Raises:
        DataError: a split is empty.
    """
    last_only = (task.chat or ChatSection()).train_on == "last_answer"
    counts, notes = dict(raw.counts), list(raw.notes)
    parts = {}
    for split, whole, limit in (
        ("training", raw.train, task.train_limit),
        ("validation", raw.validation, task.eval_limit),
        *((name, whole, task.eval_limit) for name, whole in raw.evaluation.items()),
    ):
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
    data_hash = _hash(parts.values())
    train, validation = parts.pop("training"), parts.pop("validation")
    return ChatData(train, validation, counts, data_hash, notes, parts, raw.mixture)


def _last_only(conversation: Conversation) -> Conversation:
    """Return the conversation with only its last turn learnt."""
    *before, last = conversation.turns
    turns = (*(replace(turn, learn=False) if turn.learn else turn for turn in before), last)
    return replace(conversation, turns=turns)


def learnt_turns(conversations: Iterable[Conversation]) -> tuple[int, int]:
    """Count the learnt turns, and the distinct ones among them.

    Two turns are the same if they and all turns before them are equal.
    """
    # A trie: a turn is identified by the number of the turn before it and by its own content.
    numbers: dict[tuple[int, str, str, str], int] = {}
    learnt = 0
    seen: set[int] = set()
    for conversation in conversations:
        at = -1
        for turn in conversation.turns:
            content = (at, turn.role, turn.text, _json(turn.extra))
            at = numbers.setdefault(content, len(numbers))
            if turn.learn:
                learnt += 1
                seen.add(at)
    return learnt, len(seen)


def _hash(splits: Iterable[Sequence[Conversation]]) -> str:
    """Return the sha256 (hex) over all turns and tools, in order and by split."""
    sha = hashlib.sha256()
    for conversations in splits:
        # Hash counts and lengths first, so that two different sequences never read the same.
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
    return json.dumps(value, sort_keys=True) if value else ""
