"""A built-in sample of conversation trees: synthetic English, in OpenAssistant's shape.

Everyday questions from a grammar (:mod:`.scenes`), with replies that were ranked by construction:
the best one has the shape there is to learn, the next says the same without it, the last says
nothing. Fillers of the two splits share no content word (:mod:`.lexicon`), so a model cannot answer
validation by remembering them. It is made to have conversations to train on without a download;
its losses compare with nothing else.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, Literal

from sparsegrad_cli.data.builtin.dialogue_lexicon import TRAIN, VALIDATION
from sparsegrad_cli.data.builtin.dialogue_scenes import SCENES, SHORTER, THANKS, VAGUE, Draw, Scene
from sparsegrad_cli.data.chat_data import RawChat
from sparsegrad_cli.data.oasst_files import conversations_from
from sparsegrad_cli.data.oasst_messages import Source
from sparsegrad_cli.errors import DataError
from sparsegrad_cli.recipe.task_section import TaskSection

__all__ = ["LIMIT", "SIZES", "generate", "load_dialogues", "write_trees"]

NAME = "builtin:dialogues"
Split = Literal["train", "validation"]
SIZES: dict[Split, int] = {"train": 480, "validation": 96}
LIMIT = 1000  # trees of one split; the smaller lexicon has more distinct first prompts than that
_QUALITY = (0.9, 0.55, 0.2)  # labels by rank


def load_dialogues(task: TaskSection) -> RawChat:
    """The sample as conversations, by the reader of OpenAssistant's exports."""
    records = []
    for split, size in SIZES.items():
        for number, tree in enumerate(generate(split, size), start=1):
            records.append((tree, Source(f"{NAME} {split}, tree {number}", split)))
    return conversations_from(records, task, where=NAME, has_split=True)


def generate(split: Split, size: int, seed: int = 0) -> list[dict[str, Any]]:
    """``size`` trees as an export has them, no two with the same first prompt.

    The same for equal arguments on every platform; no global random state is read or changed.

    Raises:
        DataError: ``size`` is below 1 or above LIMIT.
    """
    if not 1 <= size <= LIMIT:
        raise DataError(f"{size} trees cannot be made: 1 to {LIMIT:,}", where="task")
    rng = random.Random(f"dialogues {split} {seed}")
    draw = Draw(TRAIN if split == "train" else VALIDATION, rng)
    trees: list[dict[str, Any]] = []
    seen: set[str] = set()
    while len(trees) < size:
        # The scenes by turns, so that every one has its share; again where a prompt was had.
        scene = SCENES[len(trees) % len(SCENES)](draw)
        if scene.prompt not in seen:
            seen.add(scene.prompt)
            trees.append(_Grower(f"dialogues-{split}-{seed}-{len(trees) + 1:04d}", rng).tree(scene))
    return trees


def write_trees(trees: list[dict[str, Any]], path: str | Path) -> None:
    """An export file: JSON lines, one tree a line."""
    lines = [json.dumps(tree) + "\n" for tree in trees]
    Path(path).write_text("".join(lines), encoding="utf-8")


class _Grower:
    """Makes the messages of one tree, with ids that follow from the tree's."""

    def __init__(self, key: str, rng: random.Random) -> None:
        self.key, self.rng, self.made = key, rng, 0

    def tree(self, scene: Scene) -> dict[str, Any]:
        """Prompt, two or three ranked answers, and what is asked further on."""
        texts = [scene.answer.good(), scene.answer.plain(), self.rng.choice(VAGUE)]
        prompt = self.message("prompter", scene.prompt)
        answers = self.answers(prompt, texts[: self.rng.choice((2, 3, 3))])
        good, plain = answers[0], answers[1]
        if self.rng.random() < 0.7:
            asked = self.reply(good, "prompter", scene.second_prompt)
            second = scene.second_answer
            self.answers(asked, [second.good(), second.plain()][: self.rng.choice((1, 2))])
        if self.rng.random() < 0.4:
            asked = self.reply(good, "prompter", self.rng.choice(SHORTER))
            self.answers(asked, [scene.answer.brief()])
        if self.rng.random() < 0.3:
            asked = self.reply(plain, "prompter", scene.second_prompt)
            self.answers(asked, [scene.second_answer.plain()])
        if self.rng.random() < 0.2:
            self.reply(good, "prompter", self.rng.choice(THANKS))
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
        """Replies of the assistant, best first in what is returned, in any order in the tree."""
        made = [self.reply(to, "assistant", text) for text in texts]
        for rank, message in enumerate(made):
            # As in the real exports, an only reply has no rank.
            message["rank"] = rank if len(made) > 1 else None
            message["labels"] = {"quality": {"value": _QUALITY[rank], "count": 3}}
        self.rng.shuffle(to["replies"])
        return made
