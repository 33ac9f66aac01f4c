"""Build OpenAssistant trees of messages, prune them, and make conversations of their paths."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from sparsegrad_cli.data.conversation import Conversation, DropCounts, Turn
from sparsegrad_cli.data.oasst_messages import DELETED, NOT_A_MESSAGE, REJECTED, Message
from sparsegrad_cli.recipe.task_section import ChatSection

BELOW = "below a dropped message"
FILTER = "filter "  # reasons of filters begin so
NOT_DAMAGE = (BELOW, DELETED, REJECTED)  # reasons that occur in undamaged data


@dataclass(frozen=True)
class Tree:
    """A tree that is kept: its id, its root, and the split of its source."""

    key: str
    root: Message
    split: str | None


@dataclass(frozen=True)
class Forest:
    """What is left after pruning.

    Attributes:
        trees: in the order of their roots.
        replies: message id -> its replies in source order; a message without any is not in it.
        found: number of roots.
        read: number of messages; each id counts once.
        dropped: why messages were dropped; each counts once, under its own reason or as BELOW.
        unusable_values: what was damaged or repeated without costing a message.
    """

    trees: list[Tree]
    replies: dict[str, list[Message]]
    found: int
    read: int
    dropped: DropCounts
    unusable_values: DropCounts


def prune(messages: Iterable[Message], chat: ChatSection) -> Forest:
    """Link messages to trees, and drop unusable and filtered messages with all below them."""
    unusable_values = DropCounts()
    by_id = _by_id(messages, unusable_values)
    roots = [message for message in by_id.values() if message.parent is None]
    pruning = _Pruning(by_id, chat)
    trees = [tree for root in roots if (tree := pruning.tree(root)) is not None]
    pruning.drop_unreached()
    found = sum(root.fault != NOT_A_MESSAGE for root in roots)
    return Forest(trees, pruning.kept, found, len(by_id), pruning.dropped, unusable_values)


def matches_language(lang: str | None, wanted: str) -> bool:
    """Return whether a language tag is ``wanted`` or a regional form: ``pt`` takes ``pt-BR``."""
    tag, wanted = (lang or "").lower(), wanted.lower()
    return tag == wanted or tag.startswith(f"{wanted}-")


def _by_id(messages: Iterable[Message], unusable_values: DropCounts) -> dict[str, Message]:
    """Return messages by id. A repeated message counts once; two messages of one id are a fault."""
    by_id: dict[str, Message] = {}
    for message in messages:
        for what in message.unusable:
            unusable_values.add(f"{what}, read as missing", message.source.place)
        first = by_id.setdefault(message.id, message)
        if first is message:
            continue
        unusable_values.add("repeated message, read once", message.source.place)
        if (first.parent, first.role, first.text) != (message.parent, message.role, message.text):
            by_id[message.id] = replace(first, fault="id of two different messages")
        elif first.fault is None and message.fault is not None:
            by_id[message.id] = message  # deleted in one copy is deleted
    return by_id


class _Pruning:
    """One pass over all trees.

    Lists replace recursion, because a chain of messages may be thousands long.
    """

    def __init__(self, by_id: dict[str, Message], chat: ChatSection) -> None:
        self.by_id, self.chat = by_id, chat
        self.children: dict[str, list[Message]] = {}
        for message in by_id.values():
            if message.parent is not None:
                self.children.setdefault(message.parent, []).append(message)
        self.kept: dict[str, list[Message]] = {}
        self.dropped = DropCounts()
        self.reached: set[str] = set()

    def tree(self, root: Message) -> Tree | None:
        """Return the pruned tree below ``root``; None if the root itself is dropped."""
        reason = root.fault or _root_reason(root, self.chat)
        if reason is not None:
            self._drop(root, reason)
            return None
        key = root.tree or root.id
        left = [root]
        while left:
            message = left.pop()
            self.reached.add(message.id)
            kept = []
            children = self.children.get(message.id, [])
            for reply, reason in _reply_reasons(message, children, key, self.chat):
                if reason is None:
                    kept.append(reply)
                else:
                    self._drop(reply, reason)
            if kept:
                self.kept[message.id] = kept
                left.extend(kept)
        return Tree(key, root, root.source.split)

    def drop_unreached(self) -> None:
        """Drop messages below no root: their parent is missing, or they form a cycle."""
        for message in self.by_id.values():
            if message.id not in self.reached and message.parent not in self.by_id:
                self._drop(message, message.fault or "parent is not in the data")
        cycles = list(self._in_cycles())
        self.reached.update(message.id for message in cycles)
        for message in cycles:
            self._drop(message, "answers itself, directly or through others")

    def _drop(self, message: Message, reason: str) -> None:
        """Count ``message`` under its reason, and all messages below it as BELOW."""
        self.dropped.add(reason, message.source.place)
        self.reached.add(message.id)
        left = [message]
        while left:
            for reply in self.children.get(left.pop().id, []):
                if reply.id not in self.reached:
                    self.reached.add(reply.id)
                    self.dropped.add(BELOW, reply.source.place)
                    left.append(reply)

    def _in_cycles(self) -> Iterator[Message]:
        """Yield every message that is its own ancestor, among those that were not reached."""
        walk_of: dict[str, int] = {}  # message id -> number of the walk that visited it first
        for number, start in enumerate(self.by_id.values()):
            at = start
            while at.id not in self.reached and at.id not in walk_of:
                walk_of[at.id] = number
                at = self.by_id[at.parent or ""]
            if walk_of.get(at.id) != number:
                continue  # the walk ended at a reached message or in an earlier walk
            first = at
            yield first
            while (at := self.by_id[at.parent or ""]) is not first:
                yield at


def _root_reason(root: Message, chat: ChatSection) -> str | None:
    """Return why a root without a fault is dropped, or None."""
    if root.role != "user":
        return "tree that begins with the assistant"
    if chat.tree_states is not None and root.state not in (None, *chat.tree_states):
        return f"{FILTER}tree_states: {root.state}"
    return _language_reason(root, chat)


def _reply_reasons(
    message: Message, replies: Sequence[Message], key: str, chat: ChatSection
) -> Iterator[tuple[Message, str | None]]:
    """Yield (reply, why it is dropped or None) for all replies to ``message`` in tree ``key``."""
    reasons = [reply.fault or _position_reason(message, reply, key, chat) for reply in replies]
    siblings = reasons.count(None)
    for reply, reason in zip(replies, reasons, strict=True):
        if reason is None and reply.role == "assistant":
            reason = _rating_reason(reply, siblings, chat)
        yield reply, reason


def _position_reason(message: Message, reply: Message, key: str, chat: ChatSection) -> str | None:
    if reply.role == message.role:
        return "answers a message of its own role"
    if reply.tree is not None and reply.tree != key:
        return "in another tree than the message it answers"
    return _language_reason(reply, chat)


def _language_reason(message: Message, chat: ChatSection) -> str | None:
    wanted = chat.languages
    if wanted is None or any(matches_language(message.lang, each) for each in wanted):
        return None
    why = f"not in {', '.join(wanted)}" if message.lang is not None else "none given"
    return f"{FILTER}languages: {why}"


def _rating_reason(reply: Message, siblings: int, chat: ChatSection) -> str | None:
    """Return why rank or quality drops a reply, or None.

    A reply without a rank passes ``max_rank`` only if it has no siblings; one without a quality
    label never passes ``min_quality``.
    """
    if chat.max_rank is not None:
        if reply.rank is None and siblings > 1:
            return f"{FILTER}max_rank: not ranked among its siblings"
        if (reply.rank or 0) > chat.max_rank:
            return f"{FILTER}max_rank: above {chat.max_rank}"
    if chat.min_quality is not None:
        if reply.quality is None:
            return f"{FILTER}min_quality: none given"
        if reply.quality < chat.min_quality:
            return f"{FILTER}min_quality: below {chat.min_quality:g}"
    return None


@dataclass(frozen=True)
class Paths:
    """The conversations of a forest.

    Attributes:
        by_tree: (tree, its conversations); trees without any are left out.
        used: number of messages that are in a conversation.
        unanswered: number of prompts that are in none, because nothing answers them.
    """

    by_tree: list[tuple[Tree, list[Conversation]]]
    used: int
    unanswered: int


def conversations_of(forest: Forest, paths: str) -> Paths:
    """Return the conversations of every tree.

    A prompt that nothing answers is cut first, so every path ends with the assistant, and no path
    is only the beginning of another.

    Args:
        forest: pruned trees, in which roles alternate.
        paths: ``threads``: from the root to every leaf, all assistant turns learnt; ``best``: one
            per tree, by :func:`preference` at every step; ``replies``: one for every assistant
            reply, which alone is learnt.
    """
    answers: dict[str, list[Message]] = {}
    unanswered = sum(tree.root.id not in forest.replies for tree in forest.trees)
    for parent, replies in forest.replies.items():
        left = [each for each in replies if each.role == "assistant" or each.id in forest.replies]
        unanswered += len(replies) - len(left)
        if left:
            answers[parent] = sorted(left, key=preference)[:1] if paths == "best" else left
    by_tree = []
    used = 0
    for tree in forest.trees:
        conversations = []
        for turns, new in _turns(tree.root, answers, reply_only=paths == "replies"):
            conversations.append(Conversation(turns, tree.key))
            used += new
        if conversations:
            by_tree.append((tree, conversations))
    return Paths(by_tree, used, unanswered)


def preference(message: Message) -> tuple[bool, int, float, str]:
    """Return the sort key of siblings, the best first: by rank, then quality, then id.

    Messages without a rank come last. The id says nothing about quality; it makes the choice
    independent of the order of a file.
    """
    unranked = message.rank is None
    return unranked, message.rank or 0, -(message.quality or 0.0), message.id


def _turns(
    root: Message, answers: dict[str, list[Message]], *, reply_only: bool
) -> Iterator[tuple[tuple[Turn, ...], int]]:
    """Yield (turns, number of messages that no earlier path had), depth first.

    Paths lead to every leaf, or with ``reply_only`` to every assistant message. A list replaces
    recursion, because a chain of messages may be thousands long.
    """
    path: list[Turn] = []
    new = 0
    left = [(root, 0)]
    while left:
        message, depth = left.pop()
        is_assistant = message.role == "assistant"
        del path[depth:]
        path.append(Turn(message.role, message.text, learn=is_assistant and not reply_only))
        new += 1
        replies = answers.get(message.id, [])
        if is_assistant and (reply_only or not replies):
            yield (*path[:-1], Turn(message.role, message.text, learn=True)), new
            new = 0
        left.extend((reply, depth + 1) for reply in reversed(replies))
