"""Paths through OpenAssistant trees, as conversations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sparsegrad_cli.data.conversation import Conversation, Turn
from sparsegrad_cli.data.oasst_messages import Message
from sparsegrad_cli.data.oasst_trees import Forest, Tree


@dataclass(frozen=True)
class Threads:
    """Conversations of a forest, and what of it they use.

    Attributes:
        of_tree: (tree, its conversations); trees without any are left out.
        used: how many messages are in a conversation.
        unanswered: how many prompts are not, because nothing answers them.
    """

    of_tree: list[tuple[Tree, list[Conversation]]]
    used: int
    unanswered: int


def threads(forest: Forest, paths: str) -> Threads:
    """The conversations of every tree.

    A prompt that nothing answers is cut first: a path ends with the assistant, and none is the
    mere beginning of another.

    Args:
        forest: pruned trees, in which roles alternate.
        paths: ``threads``: from the root to every leaf, all assistant turns learnt; ``best``: one
            a tree, by ``preference`` at every step; ``replies``: to every reply of the assistant,
            which alone is learnt.
    """
    answers: dict[str, list[Message]] = {}
    unanswered = sum(tree.root.id not in forest.replies for tree in forest.trees)
    for name, replies in forest.replies.items():
        left = [each for each in replies if each.role == "assistant" or each.id in forest.replies]
        unanswered += len(replies) - len(left)
        if left:
            answers[name] = sorted(left, key=preference)[:1] if paths == "best" else left
    of_tree = []
    used = 0
    for tree in forest.trees:
        conversations = []
        for turns, met in _paths(tree.root, answers, alone=paths == "replies"):
            conversations.append(Conversation(turns, tree.key))
            used += met
        if conversations:
            of_tree.append((tree, conversations))
    return Threads(of_tree, used, unanswered)


def preference(message: Message) -> tuple[bool, int, float, str]:
    """Sorts siblings, the best first: by rank; those without one last, by quality, then by id.

    The id says nothing of worth; it makes the choice the same in whatever order a file stands.
    """
    unranked = message.rank is None
    return unranked, message.rank or 0, -(message.quality or 0.0), message.id


def _paths(
    root: Message, answers: dict[str, list[Message]], *, alone: bool
) -> Iterator[tuple[tuple[Turn, ...], int]]:
    """(turns, how many of them no earlier path had), depth first, in source order.

    To every leaf; or, with ``alone``, to every message of the assistant, alone learnt. Without
    recursion, and with one Turn a message however many paths it is in.
    """
    path: list[Turn] = []
    met = 0
    left = [(root, 0)]
    while left:
        message, depth = left.pop()
        spoken = message.role == "assistant"
        del path[depth:]
        path.append(Turn(message.role, message.text, learn=spoken and not alone))
        met += 1
        replies = answers.get(message.id, [])
        if spoken and (alone or not replies):
            yield (*path[:-1], Turn(message.role, message.text, learn=True)), met
            met = 0
        left.extend((reply, depth + 1) for reply in reversed(replies))
