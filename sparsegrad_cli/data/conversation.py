"""What a conversation is, wherever it was read from. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Turn:
    """One message.

    Attributes:
        role: who speaks.
        text: what is said, as it stands in the source.
        learn: whether its tokens are labelled; only an assistant's can be.
    """

    role: Role
    text: str
    learn: bool = False


@dataclass(frozen=True)
class Conversation:
    """A sequence of turns that ends with a learnt one.

    Attributes:
        turns: in order.
        group: conversations of one group (an OpenAssistant tree, a row of a file) must stay in one
            split: they share text.
    """

    turns: tuple[Turn, ...]
    group: str


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
