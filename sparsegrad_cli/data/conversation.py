"""What a conversation is, wherever it was read from. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class Turn:
    """One message.

    Attributes:
        role: who speaks.
        text: what is said, as it stands in the source.
        learn: whether its tokens are labelled; only an assistant's can be.
        extra: other keys of the message that the chat template reads: ``tool_calls``,
            ``tool_call_id``, ``name``, ``reasoning_content``.
    """

    role: Role
    text: str
    learn: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Conversation:
    """A sequence of turns that ends with a learnt one.

    Attributes:
        turns: in order.
        group: conversations of one group (an OpenAssistant tree, a row of a file) must stay in one
            split: they share text.
        tools: JSON schemas of the tools that the assistant may call, or None.
        place: where it stands, as ``file:line``; empty where that is not known.
    """

    turns: tuple[Turn, ...]
    group: str
    tools: Sequence[Mapping[str, Any]] | None = field(default=None, hash=False)
    place: str = ""

    @property
    def where(self) -> str:
        """Its place for an error message."""
        return self.place or f"conversation {self.group}"


@dataclass(frozen=True)
class ChatData:
    """A chat data set, split.

    Attributes:
        train, validation: conversations in source order; no group is in both.
        counts: what was kept and dropped, in words, with how many: ``{"trees read": 100, ...}``.
        notes: what the user should know beyond the counts.
        data_hash: sha256 (hex) over every turn used, in order, and over the split.
    """

    train: list[Conversation]
    validation: list[Conversation]
    counts: Mapping[str, int]
    data_hash: str
    notes: list[str] = field(default_factory=list)
