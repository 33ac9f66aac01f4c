"""Conversations, independent of where they were read. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]


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
    """

    train: list[Conversation]
    validation: list[Conversation]
    counts: Mapping[str, int]
    data_hash: str
    notes: list[str] = field(default_factory=list)
