"""What a task is: columns, labels, metrics. Imports nothing heavy, so recipes are checked fast."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from sparsegrad_cli.errors import UsageError

CLASS_METRICS = ("accuracy", "f1", "matthews_correlation")
SCORE_METRICS = ("pearson", "spearmanr")
FILE_TASKS = ("csv", "json", "parquet")
CHAT_TASKS = ("oasst", "chat", "builtin:dialogues")
CHAT_METRICS = ("loss", "perplexity", "token_accuracy")


@dataclass(frozen=True)
class TaskSpec:
    """One task.

    Attributes:
        name: as in a recipe: ``glue/rte``, ``builtin:acceptability``, ``csv``.
        text_columns: one or two column names, as in the hub's nyu-mll/glue or in the user's files.
        label_column: the column with the label or score.
        label_names: class names by id; None for a regression task.
        regression: labels are scores.
        metric: the metric that selects the best model.
        metrics: all official metrics of the task, ``metric`` among them.
        eval_splits: names of the validation sets, the selecting one first.
    """

    name: str
    text_columns: tuple[str] | tuple[str, str]
    label_column: str
    label_names: tuple[str, ...] | None
    regression: bool
    metric: str
    metrics: tuple[str, ...]
    eval_splits: tuple[str, ...] = ("validation",)

    @property
    def has_pair(self) -> bool:
        """True when an example is two texts."""
        return len(self.text_columns) == 2


@dataclass(frozen=True)
class Examples:
    """One split as it was read: ``text_pair`` is None for a single-text task.

    ``label`` holds class ids or scores. All lists have one item an example, in file order.
    """

    text: list[str]
    text_pair: list[str] | None
    label: list[int] | list[float]

    def __len__(self) -> int:
        return len(self.text)

    def first(self, count: int | None) -> Examples:
        """The first ``count`` examples, or all of them for None."""
        if count is None or count >= len(self):
            return self
        pairs = self.text_pair[:count] if self.text_pair is not None else None
        return Examples(self.text[:count], pairs, self.label[:count])


@dataclass(frozen=True)
class RawTask:
    """A task read from wherever it lies, before limits; ``notes`` say what was left out."""

    spec: TaskSpec
    train: Examples
    validation: dict[str, Examples]
    notes: list[str] = field(default_factory=list)


def _glue(
    name: str,
    text_columns: tuple[str] | tuple[str, str],
    label_names: tuple[str, ...] | None,
    metrics: tuple[str, ...] = ("accuracy",),
    eval_splits: tuple[str, ...] = ("validation",),
) -> TaskSpec:
    return TaskSpec(
        name=f"glue/{name}",
        text_columns=text_columns,
        label_column="label",
        label_names=label_names,
        regression=label_names is None,
        metric=metrics[0],
        metrics=metrics,
        eval_splits=eval_splits,
    )


_SENTENCES = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
_ACCEPTABILITY = ("unacceptable", "acceptable")
_MATTHEWS = ("matthews_correlation", "accuracy")

# Column names, class ids and official metrics as in nyu-mll/glue. Note that wnli's ids run the
# other way round than those of rte and qnli.
GLUE_TASKS: dict[str, TaskSpec] = {
    "cola": _glue("cola", ("sentence",), _ACCEPTABILITY, _MATTHEWS),
    "sst2": _glue("sst2", ("sentence",), ("negative", "positive")),
    "mrpc": _glue("mrpc", _SENTENCES, ("not_equivalent", "equivalent"), ("accuracy", "f1")),
    "stsb": _glue("stsb", _SENTENCES, None, ("pearson", "spearmanr")),
    "qqp": _glue(
        "qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")
    ),
    "mnli": _glue(
        "mnli",
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        eval_splits=("validation_matched", "validation_mismatched"),
    ),
    "qnli": _glue("qnli", ("question", "sentence"), _ENTAILMENT),
    "rte": _glue("rte", _SENTENCES, _ENTAILMENT),
    "wnli": _glue("wnli", _SENTENCES, ("not_entailment", "entailment")),
}

BUILTIN_TASKS: dict[str, TaskSpec] = {
    "builtin:acceptability": TaskSpec(
        name="builtin:acceptability",
        text_columns=("sentence",),
        label_column="label",
        label_names=_ACCEPTABILITY,
        regression=False,
        metric="matthews_correlation",
        metrics=_MATTHEWS,
    )
}


def known_task_names() -> list[str]:
    """Every name that ``task.name`` takes."""
    return [*(f"glue/{name}" for name in GLUE_TASKS), *BUILTIN_TASKS, *FILE_TASKS, *CHAT_TASKS]


def with_metric(spec: TaskSpec, metric: str | None) -> TaskSpec:
    """The task selecting by ``metric``, which is put among its metrics; None keeps its own.

    Raises:
        UsageError: the metric is unknown, or does not fit a task of this kind.
    """
    if metric is None:
        return spec
    choices = SCORE_METRICS if spec.regression else CLASS_METRICS
    if metric not in choices:
        kind = "scores (regression)" if spec.regression else "classes"
        raise UsageError(
            f"{metric!r} is not a metric for a task with {kind}",
            where="task.metric",
            fix=suggest(metric, choices),
        )
    metrics = spec.metrics if metric in spec.metrics else (*spec.metrics, metric)
    return replace(spec, metric=metric, metrics=metrics)


def suggest(given: str, choices: Sequence[str]) -> str:
    """``did you mean X?`` when something is near, then all there is."""
    lower = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(given.lower(), list(lower), n=1, cutoff=0.6)
    hint = f"did you mean {lower[near[0]]}? " if near else ""
    return f"{hint}there is: {', '.join(choices)}"
