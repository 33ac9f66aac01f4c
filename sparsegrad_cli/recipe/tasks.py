"""Define the tasks and check their settings. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.io.suggest import suggest

if TYPE_CHECKING:
    from sparsegrad_cli.recipe.task_section import TaskSection

TaskType = Literal["classification", "regression", "multilabel"]
POSITIVE_METRICS = ("f1", "precision", "recall")  # for two classes: of the positive class
CLASS_METRICS = (
    "accuracy",
    *(f"{name}{mean}" for name in POSITIVE_METRICS for mean in ("", "_macro", "_weighted")),
    "matthews_correlation",
)
SCORE_METRICS = ("pearson", "spearmanr")
MULTILABEL_METRICS = ("f1_micro", "f1_macro", "exact_match", "average_precision")
FILE_TASKS = ("csv", "json", "parquet")
CHAT_TASKS = ("oasst", "chat", "builtin:dialogues")
CHAT_METRICS = ("loss", "perplexity", "token_accuracy")


@dataclass(frozen=True)
class TaskSpec:
    """The specification of a task.

    Attributes:
        name: the name in a recipe: ``glue/rte``, ``builtin:acceptability``, ``csv``.
        text_columns: one or two column names, as in the hub's nyu-mll/glue or in the user's files.
        label_column: the column with the label or score.
        label_names: class names by id; None for a regression task.
        regression: whether labels are scores.
        multilabel: whether a row may have several labels, or none.
        metric: the metric that selects the best model.
        metrics: all official metrics of the task, including ``metric``.
        eval_splits: names of the validation sets; the first one selects the best model.
        chosen_positive: value of ``task.positive_label``.
    """

    name: str
    text_columns: tuple[str] | tuple[str, str]
    label_column: str
    label_names: tuple[str, ...] | None
    regression: bool
    metric: str
    metrics: tuple[str, ...]
    eval_splits: tuple[str, ...] = ("validation",)
    chosen_positive: str | None = None
    multilabel: bool = False

    @property
    def has_pair(self) -> bool:
        """Whether an example has two texts."""
        return len(self.text_columns) == 2

    @property
    def positive_id(self) -> int:
        """Id of the positive class, which f1, precision and recall refer to; 1 by default."""
        names = self.label_names or ()
        return 1 if self.chosen_positive is None else names.index(self.chosen_positive)

    @property
    def positive_label(self) -> str | None:
        """Name of the positive class; None if no metric of the task refers to it."""
        if len(self.label_names or ()) != 2 or not set(self.metrics) & set(POSITIVE_METRICS):
            return None
        return (self.label_names or ())[self.positive_id]

    @property
    def kind(self) -> TaskType:
        """What its labels are."""
        if self.multilabel:
            return "multilabel"
        return "regression" if self.regression else "classification"


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

# Column names, class ids and official metrics as in nyu-mll/glue. The ids of wnli are reversed
# compared with those of rte and qnli.
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

_METRICS: dict[TaskType, tuple[str, ...]] = {
    "classification": CLASS_METRICS,
    "regression": SCORE_METRICS,
    "multilabel": MULTILABEL_METRICS,
}
_LABELS: dict[TaskType, str] = {
    "classification": "classes",
    "regression": "scores (regression)",
    "multilabel": "several labels a row",
}


def known_task_names() -> list[str]:
    """Return every name that ``task.name`` accepts."""
    return [*(f"glue/{name}" for name in GLUE_TASKS), *BUILTIN_TASKS, *FILE_TASKS, *CHAT_TASKS]


def with_metric(spec: TaskSpec, metric: str | None, positive_label: str | None = None) -> TaskSpec:
    """Return the task with ``metric`` as the selecting metric, added to its metrics.

    Args:
        spec: the task.
        metric: None keeps the task's own. For more than two classes, ``f1``, ``precision`` and
            ``recall`` become their plain mean over classes, ``f1_macro`` and so on.
        positive_label: name of the positive class; None keeps the default.

    Raises:
        UsageError: the metric is unknown or does not fit the labels, or the positive label is not
            a class of the task or has no effect on its metrics.
    """
    if metric is not None:
        choices = _METRICS[spec.kind]
        if metric not in choices:
            raise UsageError(
                f"{metric!r} is not a metric for a task with {_LABELS[spec.kind]}",
                where="task.metric",
                fix=suggest(metric, choices),
            )
        if metric in POSITIVE_METRICS and len(spec.label_names or ()) > 2:
            metric = f"{metric}_macro"
        metrics = spec.metrics if metric in spec.metrics else (*spec.metrics, metric)
        spec = replace(spec, metric=metric, metrics=metrics)
    if positive_label is None:
        return spec
    names = spec.label_names or ()
    if len(names) > 2 and metric is not None:
        raise UsageError(
            f"task.positive_label is for two classes, and {spec.name} has {len(names)}",
            where="task.positive_label",
            fix="leave it out; f1_macro and f1_weighted are means over all classes",
        )
    if spec.positive_label is None:
        raise _positive_without_effect(", ".join(spec.metrics))
    if positive_label not in names:
        raise UsageError(
            f"{positive_label!r} is not a class of {spec.name}",
            where="task.positive_label",
            fix=suggest(positive_label, names),
        )
    return replace(spec, chosen_positive=positive_label)


def check_settings(task: TaskSection) -> None:
    """Check the settings of a task against its name, before any data is read.

    Raises:
        UsageError: a setting has no effect on this task or does not fit it; ``where`` is its key.
    """
    name, metric, positive_label = task.name, task.metric, task.positive_label
    spec = BUILTIN_TASKS.get(name) or GLUE_TASKS.get(name.removeprefix("glue/"))
    is_chat = name in CHAT_TASKS
    if task.type is not None and (is_chat or spec is not None):
        kind = "conversations" if spec is None else "scores" if spec.regression else "classes"
        raise UsageError(
            f"task.type has no effect: {name} is a task of {kind}",
            where="task.type",
            fix="leave it out",
        )
    if is_chat:
        if metric is not None and metric not in CHAT_METRICS:
            raise UsageError(
                f"{metric!r} is not a metric of conversations",
                where="task.metric",
                fix=suggest(metric, CHAT_METRICS),
            )
        if positive_label is not None:
            raise _positive_without_effect(metric or CHAT_METRICS[0])
    elif spec is not None:
        with_metric(spec, metric, positive_label)
    elif name in FILE_TASKS:
        type_by_settings(task.type, metric)
        _check_multilabel(task)
        if positive_label is not None and metric not in POSITIVE_METRICS:
            raise _positive_without_effect(metric or "the default metric")


def type_by_settings(task_type: TaskType | None, metric: str | None) -> TaskType | None:
    """Return the type that ``task.type`` or else ``task.metric`` sets; None if both are unset.

    Raises:
        UsageError: the metric is unknown, or does not fit the type.
    """
    if metric is None:
        return task_type
    kinds = [kind for kind, metrics in _METRICS.items() if metric in metrics]
    if not kinds:
        raise UsageError(
            f"{metric!r} is not a metric of classes, scores or several labels a row",
            where="task.metric",
            fix=suggest(metric, [name for metrics in _METRICS.values() for name in metrics]),
        )
    if task_type in kinds:
        return task_type
    if task_type is not None:
        raise UsageError(
            f"{metric} is a metric of {kinds[0]}, and task.type is {task_type}",
            where="task.metric",
            fix=f"choose one of {', '.join(_METRICS[task_type])}; or set task.type: {kinds[0]}",
        )
    if kinds == ["multilabel"]:
        raise UsageError(
            f"{metric} is a metric of rows with several labels",
            where="task.metric",
            fix="set task.type: multilabel, or choose another metric",
        )
    return kinds[0]


def _check_multilabel(task: TaskSection) -> None:
    """Check the settings of several labels a row against each other."""
    columns, separator = task.columns, task.label_separator
    several = columns.labels if columns is not None else None
    given = {"task.columns.labels": several, "task.label_separator": separator}
    for key, value in given.items():
        if value is not None and task.type != "multilabel":
            raise UsageError(
                f"{key} is for rows with several labels",
                where=key,
                fix="set task.type: multilabel, or leave it out",
            )
    if several is None or columns is None:
        return
    if separator is not None or columns.label is not None:
        key = "task.columns.label" if separator is None else "task.label_separator"
        raise UsageError(
            f"{key} has no effect: task.columns.labels names a column of 0 and 1 for each label",
            where=key,
            fix="leave one of the two out",
        )
    twice = [name for name in several if several.count(name) > 1]
    if twice or len(several) < 2:
        what = f"got {twice[0]!r} twice" if twice else f"got {len(several)}"
        raise UsageError(
            f"expected two different columns or more, {what}",
            where="task.columns.labels",
            fix="name the column of each label once; a single column of 0 and 1 is task.type: "
            "classification",
        )


def _positive_without_effect(metrics: str) -> UsageError:
    return UsageError(
        f"task.positive_label has no effect on {metrics}",
        where="task.positive_label",
        fix=f"leave it out, or set task.metric to {', '.join(POSITIVE_METRICS)} for two classes",
    )
