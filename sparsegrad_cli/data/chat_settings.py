"""What a recipe may say about conversation data. Imports nothing heavy."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from typing import Literal

from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.io.suggest import suggest
from sparsegrad_cli.recipe.tasks import CHAT_TASKS

PATHS = ("threads", "best", "replies")
SPLITS = ("auto", "hash", "source")
KINDS = ("auto", "messages", "prompt_completion", "instruction")
TRAIN_ON = ("every_answer", "last_answer")
EXPORTED = "ready_for_export"  # the state of an OpenAssistant tree that its makers call finished

# Which task each setting goes with; those that are not here go with every one.
GOES_WITH = {
    "paths": ("oasst", "builtin:dialogues"),
    "languages": ("oasst", "builtin:dialogues"),
    "max_rank": ("oasst", "builtin:dialogues"),
    "min_quality": ("oasst", "builtin:dialogues"),
    "tree_states": ("oasst", "builtin:dialogues"),
    "hub": ("oasst", "chat"),
    "config": ("chat",),
    "train_split": ("chat",),
    "validation_split": ("chat",),
    "kind": ("chat",),
    "column": ("chat",),
}


@dataclass(frozen=True)
class ChatSettings:
    """How conversation data is read; docs/chat_data.md says it at length.

    Attributes:
        paths: which paths through a tree become conversations. ``threads``: every one from root to
            leaf, all assistant turns learnt (the paper); ``best``: one a tree, the best-ranked
            reply at every step; ``replies``: one for every assistant reply, only that one learnt.
        languages: keep only messages in these, ``("en", "pt-BR")``; ``pt`` takes ``pt-BR`` too.
        max_rank: keep only replies of the assistant ranked so or better, 0 being the best.
        min_quality: keep only replies of the assistant with such a quality label, 0 to 1.
        tree_states: keep only trees in these states, or in none that is said; None keeps all.
        split: ``hash``: by a hash of the tree or prompt; ``source``: as the files or the hub have
            it; ``auto``: ``source`` for files and hub sets with a validation part and for the
            built-in sample, ``hash`` for oasst.
        validation_fraction: share of trees or prompts that ``hash`` holds out.
        hub: ``owner/name`` of a data set on the hub; for oasst one of the same columns.
        config: its configuration, where it has several.
        train_split: its split to train on.
        validation_split: its split to validate on; None takes ``validation`` where there is one.
        kind: what the columns are; ``auto`` looks at their names.
        column: the column with the turns, where it is not ``messages`` or ``conversations``.
        train_on: ``every_answer`` that is not masked, or the ``last_answer`` of each conversation.
    """

    paths: Literal["threads", "best", "replies"] = "threads"
    languages: tuple[str, ...] | None = None
    max_rank: int | None = None
    min_quality: float | None = None
    tree_states: tuple[str, ...] | None = (EXPORTED,)
    split: Literal["auto", "hash", "source"] = "auto"
    validation_fraction: float = 0.1
    hub: str | None = None
    config: str | None = None
    train_split: str = "train"
    validation_split: str | None = None
    kind: Literal["auto", "messages", "prompt_completion", "instruction"] = "auto"
    column: str | None = None
    train_on: Literal["every_answer", "last_answer"] = "every_answer"

    def check(self, task: str) -> None:
        """Refuse what cannot be, and what does not go with ``task``.

        Raises:
            UsageError: naming the setting.
        """
        for setting in fields(self):
            tasks = GOES_WITH.get(setting.name, CHAT_TASKS)
            if task not in tasks and getattr(self, setting.name) != setting.default:
                raise UsageError(
                    f"{setting.name} does not go with {task}",
                    where=f"task.chat.{setting.name}",
                    fix=f"it goes with {' and '.join(tasks)}",
                )
        choices_of = {"paths": PATHS, "split": SPLITS, "kind": KINDS, "train_on": TRAIN_ON}
        for name, choices in choices_of.items():
            value = getattr(self, name)
            if value not in choices:
                raise UsageError(
                    f"{name} is {value!r}",
                    where=f"task.chat.{name}",
                    fix=suggest(str(value), choices),
                )
        self._check_numbers()
        for name in ("languages", "tree_states"):
            if getattr(self, name) is not None and not getattr(self, name):
                raise UsageError(f"{name} is an empty list", where=f"task.chat.{name}")
        if self.hub is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.hub):
            raise UsageError(
                f"{self.hub!r} is no data set of the hub", where="task.chat.hub", fix="owner/name"
            )

    def _check_numbers(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise UsageError(
                f"validation_fraction is {self.validation_fraction:g}, it must lie between 0 and 1",
                where="task.validation_fraction",
            )
        if self.max_rank is not None and self.max_rank < 0:
            raise UsageError(
                f"max_rank is {self.max_rank}, the best rank is 0", where="task.chat.max_rank"
            )
        quality = self.min_quality
        if quality is not None and not (math.isfinite(quality) and 0 <= quality <= 1):
            raise UsageError(
                f"min_quality is {quality:g}, it must lie between 0 and 1",
                where="task.chat.min_quality",
            )
