"""Define the ``task`` section of a recipe. Imports no torch."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from sparsegrad_cli.recipe.section import NonNegativeInt, PositiveInt, Section, SettingError
from sparsegrad_cli.recipe.tasks import TaskType

_TAKEN_NAMES = ("train", "training", "validation", "holdout", "unused")


class ColumnsSection(Section):
    """Names of the columns in your files."""

    text: str | None = Field(None, description="column of the text; text by default")
    text_pair: str | None = Field(
        None, description="column of a second text; text_pair by default, if there is one"
    )
    label: str | None = Field(None, description="column of the label or score; label by default")
    labels: tuple[str, ...] | None = Field(
        None,
        description="type multilabel: columns that hold 1 where a row has the label of the "
        "column's name, and 0 elsewhere, in place of one column of lists",
    )


class ChatSection(Section):
    """Which conversations are trained on, and how (docs/reference/chat-data.md)."""

    paths: Literal["threads", "best", "replies"] = Field(
        "threads",
        description="threads: every path from root to leaf (the paper); best: the best-ranked "
        "reply at every step; replies: one path for every reply, which alone is learnt",
    )
    languages: tuple[str, ...] | None = Field(
        None, description="keep only messages in these languages, such as [en]"
    )
    max_rank: NonNegativeInt | None = Field(
        None, description="keep only replies of this rank or better; 0 is the best"
    )
    min_quality: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="keep only replies with a quality label of at least this value"
    )
    tree_states: tuple[str, ...] | None = Field(
        ("ready_for_export",),
        description="keep only trees in these states; null keeps all",
    )
    split: Literal["auto", "hash", "source"] = Field(
        "auto", description="hash: by a hash of the tree or prompt; source: the split of the data"
    )
    hub: str | None = Field(None, description="owner/name of a data set on the hub")
    config: str | None = Field(
        None, description="configuration of that data set, if it has several"
    )
    train_split: str = Field("train", description="split of task.chat.hub that is trained on")
    validation_split: str | None = Field(
        None, description="split of task.chat.hub for validation; by default split off at random"
    )
    kind: Literal["auto", "messages", "prompt_completion", "instruction"] = Field(
        "auto", description="chat: how rows are read; auto decides by the column names"
    )
    column: str | None = Field(None, description="chat: name of the column with the turns")
    train_on: Literal["every_answer", "last_answer"] = Field(
        "every_answer",
        description="last_answer: only the last answer of a conversation is labelled",
    )
    packing: Literal["none", "pack", "concatenate"] = Field(
        "none",
        description="none: one conversation per row; pack: several, none sees another; "
        "concatenate: one long text cut into rows of max_length (the paper)",
    )
    forgetting: str | None = Field(
        None,
        min_length=1,
        description="a plain text file whose loss is measured at every evaluation",
    )

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        for key in ("languages", "tree_states"):
            if getattr(self, key) == ():
                raise SettingError("needs at least one value", key, fix="null keeps all messages")
        if self.hub is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.hub):
            what = f"expected owner/name, got {self.hub!r}"
            raise SettingError(what, "hub", fix="OpenAssistant/oasst1, for example")
        return self


class SourceSection(Section):
    """One source of a training mixture. A path alone is short for a weight of 1."""

    path: str = Field(min_length=1, description="file or folder, as task.path")
    weight: Annotated[float, Field(gt=0)] = Field(
        1.0, description="its share of the rows, in proportion to the other weights"
    )
    name: str | None = Field(
        None, min_length=1, description="for the record and the report; by default the file's name"
    )

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @property
    def label(self) -> str:
        """Its name, or that of its file or folder without suffixes."""
        return self.name or PurePath(self.path).name.partition(".")[0] or self.path


class TaskSection(Section):
    """``task: NAME`` is short for ``task: {name: NAME}``."""

    name: str = Field(
        "builtin:acceptability",
        description="glue/<task>, oasst, builtin:acceptability, builtin:dialogues, csv, json, "
        "parquet or chat",
        min_length=1,
    )
    path: str | None = Field(
        None, min_length=1, description="local file or folder that holds the task"
    )
    mix: tuple[SourceSection, ...] | None = Field(
        None,
        min_length=2,
        description="csv, json, parquet, chat: several sources in place of task.path, each with "
        "path, weight and name; an epoch takes rows in proportion to the weights",
    )
    mix_until: Literal["first_exhausted", "all_exhausted"] = Field(
        "first_exhausted",
        description="size of a mixture. first_exhausted: no row is repeated, and rows of larger "
        "sources are left out; all_exhausted: every row is taken, and smaller sources repeat",
    )
    evaluation: dict[str, str] | None = Field(
        None,
        description="csv, json, parquet and chat tasks: further files to evaluate on, by name, "
        "such as {ood: other.csv}; the validation part still selects the best model",
    )
    columns: ColumnsSection | None = Field(None, description="names of the columns of your files")
    separator: str | None = Field(
        None,
        pattern=r'^([^"\r\n]|tab)$',
        description="separator of CSV and TSV files: one character, or tab; found out by default",
    )
    chat: ChatSection | None = Field(None, description="settings of oasst, dialogues and chat")
    type: TaskType | None = Field(
        None,
        description="csv, json, parquet: whether labels are classes, scores (regression), or "
        "several labels a row (multilabel); by default task.metric decides, then the labels, "
        "between the first two (docs/reference/labels.md)",
    )
    label_separator: str | None = Field(
        None,
        min_length=1,
        description="type multilabel: text between the labels in a cell, such as ';'; by default "
        "a cell holds a list, in CSV written as JSON",
    )
    metric: str | None = Field(
        None, description="metric that selects the best model; by default the task's own"
    )
    positive_label: str | None = Field(
        None,
        min_length=1,
        description="positive class of f1, precision and recall with two classes; by default the "
        "second one, with a note",
    )
    max_length: PositiveInt = Field(128, description="number of tokens kept of an example")
    padding: Literal["dynamic", "fixed"] = Field(
        "dynamic",
        description="dynamic: pad to the longest of the batch; fixed: to max_length (the paper)",
    )
    train_limit: PositiveInt | None = Field(
        None, description="use only the first n training examples"
    )
    eval_limit: PositiveInt | None = Field(
        None, description="use only the first n validation examples"
    )
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.1, description="share split off for validation if your files have no validation part"
    )

    holdout: PositiveInt | Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="texts with labels: number or share of training rows that are held out at "
        "random, the same for every seed, to choose the best model and to tune on; the validation "
        "data is then a test set, measured once, after training",
    )
    test_unused: PositiveInt | None = Field(
        None,
        description="holdout: test also on up to n training rows that train_limit leaves out",
    )

    @model_validator(mode="after")
    def _holdout_fits(self) -> Self:
        if self.test_unused is not None and self.holdout is None:
            what = "tests on training rows, which needs task.holdout"
            raise SettingError(
                what, "test_unused", "holdout", fix="set task.holdout, or leave it out"
            )
        if self.test_unused is not None and self.train_limit is None:
            what = "tests on rows that task.train_limit leaves out, and it leaves none out"
            raise SettingError(what, "test_unused", "train_limit", fix="set task.train_limit")
        if self.holdout is not None and self.mix is not None:
            what = "cannot hold out rows of a mixture, which may repeat them"
            raise SettingError(what, "holdout", "mix", fix="leave one out")
        return self

    @model_validator(mode="after")
    def _sources_and_sets(self) -> Self:
        if self.mix is not None and self.path is not None:
            raise SettingError("and path exclude each other", "mix", "path", fix="leave one out")
        labels = [source.label for source in self.mix or ()]
        twice = next((label for label in labels if labels.count(label) > 1), None)
        if twice is not None:
            what = f"names two sources {twice!r}"
            raise SettingError(what, "mix", fix="give each a name of its own: {path: ..., name: a}")
        for name in self.evaluation or ():
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name):
                what = f"expected a name of letters, digits and _, got {name!r:.60}"
                raise SettingError(what, "evaluation", fix="ood: other.csv")
            if name in _TAKEN_NAMES:
                what = f"the name {name!r} is taken by the task's own data"
                raise SettingError(what, "evaluation", fix=f"another name, such as {name}_2")
        if self.evaluation == {}:
            raise SettingError("names no file", "evaluation", fix="evaluation: {ood: other.csv}")
        return self

    @property
    def train_paths(self) -> tuple[str, ...]:
        """The files or folders to train on: those of the mixture, or ``path``."""
        if self.mix is not None:
            return tuple(source.path for source in self.mix)
        return () if self.path is None else (self.path,)
