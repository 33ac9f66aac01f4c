"""``builtin:dialogues``: synthetic English conversation trees in OpenAssistant's shape.

Everyday questions come from a grammar (:mod:`.dialogue_scenes`), with ranked replies: the best one
has the shape to be learnt, the next says the same without it, the last says nothing. The fillers of
the two splits share no content word (dialogue_words.yaml), so a model cannot answer validation by
remembering them. The task allows real training without a download; its losses compare with
nothing else.
"""

from __future__ import annotations

import random
from typing import Any, Literal

from sparsegrad_cli.data.builtin.dialogue_scenes import SCENES, WORDS, Draw, Scene
from sparsegrad_cli.data.conversation import RawChat
from sparsegrad_cli.data.oasst_files import conversations_from
from sparsegrad_cli.data.oasst_messages import Source
from sparsegrad_cli.errors import DataError
from sparsegrad_cli.recipe.task_section import TaskSection

NAME = "builtin:dialogues"
Split = Literal["train", "validation"]
SIZES: dict[Split, int] = {"train": 480, "validation": 96}
LIMIT = 1000  # trees of one split; both lexica have more distinct first prompts
_QUALITY = (0.9, 0.55, 0.2)  # labels by rank
_VAGUE = (
    "That depends on many things. It is hard to say without knowing more.",
    "I am not sure what you mean, sorry.",
    "Many people ask themselves this. Opinions differ a lot!!!",
    "You could look it up somewhere, there are websites for such questions.",
)
_SHORTER = ("Can you say that in one line?", "Shorter, please.")
_THANKS = ("Thank you!", "Great, that helps.")


def load_dialogues(task: TaskSection) -> RawChat:
    """Read the sample as conversations, like an OpenAssistant export."""
    records = []
    for split, size in SIZES.items():
        for number, tree in enumerate(generate(split, size), start=1):
            records.append((tree, Source(f"{NAME} {split}, tree {number}", split)))
    return conversations_from(records, task, where=NAME, has_split=True)


def generate(split: Split, size: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return ``size`` trees as an export has them, no two with the same first prompt.

    Equal arguments give equal results on every platform.

    Raises:
        DataError: ``size`` is below 1 or above LIMIT.
    """
    if not 1 <= size <= LIMIT:
        raise DataError(f"{size} trees cannot be made: 1 to {LIMIT:,}", where="task")
    rng = random.Random(f"dialogues {split} {seed}")
    draw = Draw(WORDS[split], rng)
    trees: list[dict[str, Any]] = []
    seen: set[str] = set()
    while len(trees) < size:
        # Scenes alternate, so that each has its share; a repeated prompt is drawn again.
        scene = SCENES[len(trees) % len(SCENES)](draw)
        if scene.prompt not in seen:
            seen.add(scene.prompt)
            trees.append(
                _TreeMaker(f"dialogues-{split}-{seed}-{len(trees) + 1:04d}", rng).tree(scene)
            )
    return trees


class _TreeMaker:
    """Make the messages of one tree, with ids derived from the tree's."""

    def __init__(self, key: str, rng: random.Random) -> None:
        self.key, self.rng, self.made = key, rng, 0

    def tree(self, scene: Scene) -> dict[str, Any]:
        """Return a prompt with two or three ranked answers and further questions."""
        texts = [scene.answer.good(), scene.answer.plain(), self.rng.choice(_VAGUE)]
        prompt = self.message("prompter", scene.prompt)
        answers = self.answers(prompt, texts[: self.rng.choice((2, 3, 3))])
        good, plain = answers[0], answers[1]
        if self.rng.random() < 0.7:
            asked = self.reply(good, "prompter", scene.second_prompt)
            second = scene.second_answer
            self.answers(asked, [second.good(), second.plain()][: self.rng.choice((1, 2))])
        if self.rng.random() < 0.4:
            asked = self.reply(good, "prompter", self.rng.choice(_SHORTER))
            self.answers(asked, [scene.answer.brief()])
        if self.rng.random() < 0.3:
            asked = self.reply(plain, "prompter", scene.second_prompt)
            self.answers(asked, [scene.second_answer.plain()])
        if self.rng.random() < 0.2:
            self.reply(good, "prompter", self.rng.choice(_THANKS))
        return {"message_tree_id": self.key, "tree_state": "ready_for_export", "prompt": prompt}

    def message(self, role: str, text: str, parent: str | None = None) -> dict[str, Any]:
        name = self.key if not self.made else f"{self.key}-{self.made}"
        self.made += 1
        message = {"message_id": name, "parent_id": parent, "text": text, "role": role}
        return message | {"lang": "en", "review_result": True, "deleted": False, "replies": []}

    def reply(self, to: dict[str, Any], role: str, text: str) -> dict[str, Any]:
        made = self.message(role, text, to["message_id"])
        to["replies"].append(made)
        return made

    def answers(self, to: dict[str, Any], texts: list[str]) -> list[dict[str, Any]]:
        """Add replies of the assistant in random order, and return them best first."""
        made = [self.reply(to, "assistant", text) for text in texts]
        for rank, message in enumerate(made):
            # As in real exports, a reply without siblings has no rank.
            message["rank"] = rank if len(made) > 1 else None
            message["labels"] = {"quality": {"value": _QUALITY[rank], "count": 3}}
        self.rng.shuffle(to["replies"])
        return made
