"""Define the tasks and check their settings. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.io.suggest import suggest

if TYPE_CHECKING:
    from sparsegrad_cli.recipe.task_section import TaskSection

TaskType = Literal["classification", "regression"]
POSITIVE_METRICS = ("f1", "precision", "recall")  # for two classes: of the positive class
CLASS_METRICS = (
    "accuracy",
    *(f"{name}{mean}" for name in POSITIVE_METRICS for mean in ("", "_macro", "_weighted")),
    "matthews_correlation",
)
SCORE_METRICS = ("pearson", "spearmanr")
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
        choices = SCORE_METRICS if spec.regression else CLASS_METRICS
        if metric not in choices:
            kind = "scores (regression)" if spec.regression else "classes"
            raise UsageError(
                f"{metric!r} is not a metric for a task with {kind}",
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
        if positive_label is not None and metric not in POSITIVE_METRICS:
            raise _positive_without_effect(metric or "the default metric")


def type_by_settings(task_type: TaskType | None, metric: str | None) -> TaskType | None:
    """Return the type that ``task.type`` or else ``task.metric`` sets; None if both are unset.

    Raises:
        UsageError: the metric is unknown, or does not fit the type.
    """
    if metric is None:
        return task_type
    if metric not in (*CLASS_METRICS, *SCORE_METRICS):
        raise UsageError(
            f"{metric!r} is not a metric of classes or scores",
            where="task.metric",
            fix=suggest(metric, (*CLASS_METRICS, *SCORE_METRICS)),
        )
    by_metric: TaskType = "regression" if metric in SCORE_METRICS else "classification"
    if task_type is not None and task_type != by_metric:
        choices = SCORE_METRICS if task_type == "regression" else CLASS_METRICS
        raise UsageError(
            f"{metric} is a metric of {by_metric}, and task.type is {task_type}",
            where="task.metric",
            fix=f"choose one of {', '.join(choices)}; or leave task.type out",
        )
    return by_metric


def _positive_without_effect(metrics: str) -> UsageError:
    return UsageError(
        f"task.positive_label has no effect on {metrics}",
        where="task.positive_label",
        fix=f"leave it out, or set task.metric to {', '.join(POSITIVE_METRICS)} for two classes",
    )
