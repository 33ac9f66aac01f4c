"""Choose paths through OpenAssistant trees, and make conversations of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sparsegrad_cli.data.conversation import Conversation, Turn
from sparsegrad_cli.data.oasst_messages import Message
from sparsegrad_cli.data.oasst_trees import Forest, Tree


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
