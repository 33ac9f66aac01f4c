"""The ``task`` section of a recipe. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sparsegrad_cli.recipe.section import NonNegativeInt, PositiveInt, Section
from sparsegrad_cli.recipe.tasks import TaskType


class ColumnsSection(Section):
    """Names of the columns in the user's own files."""

    text: str | None = None
    text_pair: str | None = None
    label: str | None = None


class ChatSection(Section):
    """Which conversations are learnt from, and how they become rows (docs/chat_data.md)."""

    paths: Literal["threads", "best", "replies"] = Field(
        "threads",
        description="threads: every path from root to leaf (the paper); best: the best-ranked "
        "reply at every step; replies: every reply once, what leads to it unlabelled",
    )
    languages: tuple[str, ...] | None = Field(
        None, min_length=1, description="keep only messages in these languages, such as [en]"
    )
    max_rank: NonNegativeInt | None = Field(
        None, description="keep replies of this rank or better; 0 is the best"
    )
    min_quality: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="keep replies with such a quality label"
    )
    tree_states: tuple[str, ...] | None = Field(
        ("ready_for_export",),
        min_length=1,
        description="keep only trees in these states; null keeps all",
    )
    split: Literal["auto", "hash", "source"] = Field(
        "auto", description="hash: by a hash of tree or prompt; source: as files or hub have it"
    )
    hub: str | None = Field(
        None, pattern=r"^[\w.-]+/[\w.-]+$", description="owner/name of a data set on the hub"
    )
    config: str | None = Field(None, description="configuration of that data set")
    train_split: str = "train"
    validation_split: str | None = None
    kind: Literal["auto", "messages", "prompt_completion", "instruction"] = Field(
        "auto", description="chat: what the columns are; auto goes by their names"
    )
    column: str | None = Field(None, description="chat: the column with the turns")
    train_on: Literal["every_answer", "last_answer"] = Field(
        "every_answer",
        description="last_answer: only the last answer of a conversation is labelled",
    )
    packing: Literal["none", "pack", "concatenate"] = Field(
        "none",
        description="none: one conversation a row; pack: several, none sees another; concatenate: "
        "one long text cut into rows of max_length (the paper)",
    )
    forgetting: str | None = Field(
        None,
        min_length=1,
        description="a plain text file: its loss is measured too, but selects nothing",
    )


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
    columns: ColumnsSection | None = None
    separator: str | None = Field(
        None,
        pattern=r'^([^"\r\n]|tab)$',
        description="what separates the columns of a CSV or TSV file: one character, or tab; found "
        "out by default",
    )
    chat: ChatSection | None = Field(None, description="settings of oasst, dialogues and chat")
    type: TaskType | None = Field(
        None,
        description="csv, json, parquet: what the labels are; by default task.metric decides, then "
        "the labels (docs/labels.md)",
    )
    metric: str | None = Field(None, description="score to select by; the task's own by default")
    positive_label: str | None = Field(
        None,
        min_length=1,
        description="class that f1, precision and recall of two classes are of; by default the "
        "second, and a note names it",
    )
    max_length: PositiveInt = Field(128, description="tokens kept of an example")
    padding: Literal["dynamic", "fixed"] = Field(
        "dynamic", description="pad to the batch's longest, or always to max_length (the paper)"
    )
    train_limit: PositiveInt | None = Field(None, description="first n training examples only")
    eval_limit: PositiveInt | None = Field(None, description="first n validation examples only")
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.1, description="share split off when the user's files have no validation part"
    )
