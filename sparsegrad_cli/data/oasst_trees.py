"""OpenAssistant trees from messages in any order; what is unusable or not wanted is pruned."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from sparsegrad_cli.data.chat_settings import ChatSettings
from sparsegrad_cli.data.drop_counts import Tally
from sparsegrad_cli.data.oasst_messages import DELETED, NO_MESSAGE, REJECTED, Message

BELOW = "below a dropped message"
FILTER = "filter "  # how the reasons of filters begin
EXPECTED = (BELOW, DELETED, REJECTED)  # reasons of whole data; the others mean damage


@dataclass(frozen=True)
class Tree:
    """A tree that is left; ``key`` is its id, ``split`` what its source says of it."""

    key: str
    root: Message
    split: str | None


@dataclass(frozen=True)
class Forest:
    """What is left after pruning.

    Attributes:
        trees: in the order of their roots.
        replies: message id -> its replies, in source order; a message without any is not in it.
        found: how many roots were met.
        read: how many messages were met, each id once.
        dropped: why messages were dropped; each once, under its own reason or as BELOW.
        remarks: what was damaged or repeated without costing a message.
    """

    trees: list[Tree]
    replies: dict[str, list[Message]]
    found: int
    read: int
    dropped: Tally
    remarks: Tally


def grow(messages: Iterable[Message], settings: ChatSettings) -> Forest:
    """Link messages to trees and prune these: a message goes with all that hangs below it."""
    remarks = Tally()
    known = _by_id(messages, remarks)
    roots = [message for message in known.values() if message.parent is None]
    pruning = _Pruning(known, settings)
    trees = [tree for root in roots if (tree := pruning.tree(root)) is not None]
    pruning.drop_unreached()
    found = sum(root.fault != NO_MESSAGE for root in roots)
    return Forest(trees, pruning.kept, found, len(known), pruning.dropped, remarks)


def _by_id(messages: Iterable[Message], remarks: Tally) -> dict[str, Message]:
    """Messages by id. The same one again counts once; an id with two meanings is a fault."""
    known: dict[str, Message] = {}
    for message in messages:
        for remark in message.remarks:
            remarks.add(f"{remark}, read as not given", message.source.place)
        before = known.setdefault(message.id, message)
        if before is message:
            continue
        remarks.add("message met again, read once", message.source.place)
        if (before.parent, before.role, before.text) != (
            message.parent,
            message.role,
            message.text,
        ):
            known[message.id] = replace(before, fault="id of two different messages")
        elif before.fault is None and message.fault is not None:
            known[message.id] = message  # deleted in one copy is deleted
    return known


class _Pruning:
    """One pass over all trees, without recursion: a chain may be thousands of messages long."""

    def __init__(self, known: dict[str, Message], settings: ChatSettings) -> None:
        self.known, self.settings = known, settings
        self.children: dict[str, list[Message]] = {}
        for message in known.values():
            if message.parent is not None:
                self.children.setdefault(message.parent, []).append(message)
        self.kept: dict[str, list[Message]] = {}
        self.dropped = Tally()
        self.reached: set[str] = set()

    def tree(self, root: Message) -> Tree | None:
        """The pruned tree below ``root``; None where the root itself is dropped."""
        reason = root.fault or root_reason(root, self.settings)
        if reason is not None:
            self.drop(root, reason)
            return None
        key = root.tree or root.id
        left = [root]
        while left:
            message = left.pop()
            self.reached.add(message.id)
            children = self.children.get(message.id, [])
            kept = []
            for reply, reason in judged(message, children, key, self.settings):
                if reason is None:
                    kept.append(reply)
                else:
                    self.drop(reply, reason)
            if kept:
                self.kept[message.id] = kept
                left.extend(kept)
        return Tree(key, root, root.source.split)

    def drop(self, message: Message, reason: str) -> None:
        """Count ``message`` under its reason, and all below it as BELOW."""
        self.dropped.add(reason, message.source.place)
        self.reached.add(message.id)
        left = [message]
        while left:
            for reply in self.children.get(left.pop().id, []):
                if reply.id not in self.reached:
                    self.reached.add(reply.id)
                    self.dropped.add(BELOW, reply.source.place)
                    left.append(reply)

    def drop_unreached(self) -> None:
        """Drop what no root leads to: messages whose parent is missing, and cycles."""
        for message in self.known.values():
            if message.id not in self.reached and message.parent not in self.known:
                self.drop(message, message.fault or "parent is not in the data")
        cycles = list(self._in_cycles())
        self.reached.update(message.id for message in cycles)
        for message in cycles:
            self.drop(message, "answers itself, by way of others or at once")

    def _in_cycles(self) -> Iterator[Message]:
        """Every message that is its own ancestor, among those not reached."""
        walk_of: dict[str, int] = {}  # message id -> number of the walk that first met it
        for number, start in enumerate(self.known.values()):
            at = start
            while at.id not in self.reached and at.id not in walk_of:
                walk_of[at.id] = number
                at = self.known[at.parent or ""]
            if walk_of.get(at.id) != number:
                continue  # it ended in another walk's, or where a root or an orphan leads
            first = at
            yield first
            while (at := self.known[at.parent or ""]) is not first:
                yield at


def root_reason(root: Message, settings: ChatSettings) -> str | None:
    """Why a root without a fault is dropped, or None."""
    if root.role != "user":
        return "tree begun by the assistant"
    states = settings.tree_states
    if states is not None and root.state is not None and root.state not in states:
        return f"{FILTER}tree_states: {root.state}"
    return _language_reason(root, settings)


def judged(
    message: Message, replies: Sequence[Message], key: str, settings: ChatSettings
) -> Iterator[tuple[Message, str | None]]:
    """(reply, why it is dropped or None) for all replies to ``message`` in the tree ``key``."""
    reasons = [reply.fault or _place_reason(message, reply, key, settings) for reply in replies]
    siblings = reasons.count(None)
    for reply, reason in zip(replies, reasons, strict=True):
        if reason is None and reply.role == "assistant":
            reason = _worth_reason(reply, siblings, settings)
        yield reply, reason


def _place_reason(message: Message, reply: Message, key: str, settings: ChatSettings) -> str | None:
    if reply.role == message.role:
        return "answers a message of its own role"
    if reply.tree is not None and reply.tree != key:
        return "of another tree than the message it answers"
    return _language_reason(reply, settings)


def _language_reason(message: Message, settings: ChatSettings) -> str | None:
    wanted = settings.languages
    if wanted is None or any(speaks(message.lang, each) for each in wanted):
        return None
    why = f"not in {', '.join(wanted)}" if message.lang is not None else "none given"
    return f"{FILTER}languages: {why}"


def speaks(lang: str | None, wanted: str) -> bool:
    """A language takes its regional forms: ``pt`` takes ``pt-BR``, not the other way round."""
    tag, wanted = (lang or "").lower(), wanted.lower()
    return tag == wanted or tag.startswith(f"{wanted}-")


def _worth_reason(reply: Message, siblings: int, settings: ChatSettings) -> str | None:
    """By rank and quality. Only where a filter is set; what was not judged does not pass it."""
    if settings.max_rank is not None:
        if reply.rank is None and siblings > 1:
            return f"{FILTER}max_rank: not ranked among its siblings"
        if (reply.rank or 0) > settings.max_rank:
            return f"{FILTER}max_rank: above {settings.max_rank}"
    if settings.min_quality is not None:
        if reply.quality is None:
            return f"{FILTER}min_quality: none given"
        if reply.quality < settings.min_quality:
            return f"{FILTER}min_quality: below {settings.min_quality:g}"
    return None
