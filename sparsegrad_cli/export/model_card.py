"""Write the model card of an export (model_card.md.jinja) without paths of this machine."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from sparsegrad_cli.export.base_model import BaseModel
from sparsegrad_cli.export.forms import FORMS
from sparsegrad_cli.io.paths import is_folder
from sparsegrad_cli.io.untrusted_text import printable_line
from sparsegrad_cli.models.pretrained import locate
from sparsegrad_cli.recipe.tasks import FILE_TASKS
from sparsegrad_cli.records.evaluation import EvaluationRecord
from sparsegrad_cli.records.export import ExportCheck, ExportedMethod, ExportRecord
from sparsegrad_cli.records.run import (
    CountsBlock,
    Evaluation,
    HashesBlock,
    MemoryBlock,
    MethodBlock,
    MetricsBlock,
    RunRecord,
    TaskBlock,
    TimeBlock,
)
from sparsegrad_cli.report.units import (
    NOTHING,
    format_bytes,
    format_count,
    format_number,
    format_share,
)

CARD = "README.md"
_DATASETS = {"oasst": "OpenAssistant/oasst1", "glue": "nyu-mll/glue"}
_LABEL_ARGUMENTS = (
    "id2label",
    "label2id",
    "problem_type",
    "pad_token_id",
    "ignore_mismatched_sizes",
)


@dataclass(frozen=True)
class CardContent:
    """What a model card tells of.

    Attributes:
        record: export.json, without the files.
        run: run.json.
        base: How users load the base model.
        labels: The labels of a classifier; empty for a language model.
        evaluations: What `evaluate` measured of the run on other files.
    """

    record: ExportRecord
    run: RunRecord
    base: BaseModel
    labels: Mapping[int, str]
    evaluations: Sequence[EvaluationRecord] = ()

    @property
    def task(self) -> TaskBlock:
        """The task of the run."""
        return self.run.task or TaskBlock()

    @property
    def pipeline(self) -> str:
        """The task of a pipeline of transformers that uses the model."""
        return "text-classification" if self.labels else "text-generation"

    @property
    def data(self) -> str:
        """The data set in words; files of the user are not named."""
        name = self.task.name
        own = name in (*FILE_TASKS, "chat")
        return f"own data ({name})" if own else str(name)

    @property
    def name(self) -> str:
        """The model in words."""
        return f"{base_title(self.record.model.name)}, fine-tuned on {self.data}"

    @property
    def label_arguments(self) -> dict[str, Any]:
        """The arguments that give an adapter's base model the labels of the run."""
        arguments = self.base.arguments
        return {name: arguments[name] for name in _LABEL_ARGUMENTS if name in arguments}

    def pipeline_line(self, place: str) -> str | None:
        """Return the line of Python that makes a pipeline of the folder; None where none can."""
        if FORMS[self.record.to].whole:
            return f'pipeline("{self.pipeline}", model="{place}")'
        if not FORMS[self.record.to].has_rank or self.base.quantization:
            return None
        named = f", model_kwargs={self.label_arguments!r}" if self.label_arguments else ""
        return f'pipeline("{self.pipeline}", model="{place}"{named})'


class Score(NamedTuple):
    """One row of the table of scores."""

    data: str
    rows: str
    metric: str
    value: str
    interval: str = NOTHING


def model_card(content: CardContent, repository: str | None = None) -> str:
    """Render README.md.

    Args:
        content: What the card tells of.
        repository: OWNER/NAME on the hub; None for a folder, whose code is run in the folder.
    """
    record, base = content.record, content.base
    check = record.check or ExportCheck()
    title = base_title(record.model.name)
    scores = [*_own_scores(content), *_other_scores(content)]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"cell": _cell, "repr": repr}
    return environment.get_template("model_card.md.jinja").render(
        to=record.to,
        hub=repository is not None,
        place=repository or ".",
        form=FORMS[record.to].words,
        metadata=_metadata(content),
        name=content.name,
        summary=_summary(content),
        version=record.versions.get("sparsegrad"),
        examples=format_count(check.examples),
        difference=format_number(check.difference, 3),
        scores=scores,
        score_note=_score_note(content),
        facts=_facts(content),
        limits=_limits(content),
        base=base,
        source=repr(_source(title, base)),
        base_place=_place(record.model.name, base),
        base_is_found=repository is None or not is_folder(base.source),
        pipeline=content.pipeline,
        labels=content.labels,
        label_arguments=content.label_arguments,
        license=licence_of(record.model.name),
    )


def base_title(name: str) -> str:
    """Return the name of a base model, without the path of a local folder."""
    return Path(locate(name)).name if is_folder(name) else name


def licence_of(name: str) -> str | None:
    """Return the licence in the model card of a base model's folder, or None."""
    folder = Path(locate(name))
    try:
        card = (folder / CARD).read_text(encoding="utf-8")[:20_000] if is_folder(folder) else ""
    except (OSError, ValueError):
        return None
    head = re.match(r"---\r?\n(.*?)^---", card, re.DOTALL | re.MULTILINE)
    found = re.search(r"^license:[ \t]*['\"]?([\w.-]+)", head[1], re.MULTILINE) if head else None
    return found[1] if found else None


def _metadata(content: CardContent) -> str:
    """Return the YAML block that the hub reads."""
    record, form = content.record, FORMS[content.record.to]
    name, relation = record.model.name, None
    on_hub = not is_folder(name) and not name.startswith("builtin:")
    if on_hub:
        relation = "finetune" if form.whole else "adapter"
    dataset = _DATASETS.get(str(content.task.name).partition("/")[0])
    results = _eval_results(content, dataset)
    method = [record.method.name] if record.method else []
    data = ModelCardData(
        base_model=name if on_hub else None,
        base_model_relation=relation,
        library_name=form.library,
        pipeline_tag=content.pipeline,
        license=licence_of(name),
        datasets=[dataset] if dataset else None,
        metrics=sorted({result.metric_type for result in results}) or None,
        tags=["sparsegrad", *method],
        model_name=content.name if results else None,
        eval_results=results or None,
    )
    return data.to_yaml()


def _eval_results(content: CardContent, dataset: str | None) -> list[EvalResult]:
    """Return the scores of the kept model on its test or validation data, for the metadata."""
    best = _kept(content)
    if best is None:
        return []
    config = str(content.task.name).partition("/")[2] if dataset else ""
    return [
        EvalResult(
            task_type=content.pipeline,
            dataset_type=dataset or str(content.task.name),
            dataset_name=content.data,
            dataset_config=config or None,
            dataset_split=split,
            metric_type=name,
            metric_value=value,
        )
        for split, values in best.values.items()
        for name, value in values.items()
        if value is not None
    ]


def _kept(content: CardContent) -> Evaluation | None:
    """Return the scores of the exported model; None for a run that has not finished."""
    if content.record.source != "adapter" or content.run.metrics is None:
        return None
    return content.run.metrics.reported


def _summary(content: CardContent) -> str:
    """Return what the model does and what was trained, in two sentences."""
    title, task = base_title(content.record.model.name), content.task
    if task.regression:
        does = "It gives a text a score."
    elif content.labels:
        names = ", ".join(_cell(label) for label in content.labels.values())
        how = "gives a text any of" if _many_labels(task) else "sorts texts into"
        does = f"It {how} {len(content.labels)} classes: {names}."
    else:
        does = "It answers in conversations."
    counts = content.run.counts or CountsBlock()
    share = ""
    if counts.trainable is not None and counts.model_parameters:
        part = format_share(counts.trainable / counts.model_parameters)
        share = f" A training step changed {part} of its parameters."
    method = content.record.method or ExportedMethod(name="sparsegrad")
    data = _cell(content.data)
    return f"{_cell(title)} was fine-tuned on {data} with the method {method.name}. {does}{share}"


def _many_labels(task: TaskBlock) -> bool:
    """Return whether a text may have several labels, or none."""
    return task.kind == "multilabel"


def _own_scores(content: CardContent) -> list[Score]:
    """Return the scores on the run's own test data, or else its validation data."""
    best = _kept(content)
    counts = content.task.validation_examples | content.task.test_examples
    if best is None:
        return []
    return [
        Score(f"{content.data}, {split}", format_count(counts.get(split)), name, _four(value))
        for split, values in best.values.items()
        for name, value in values.items()
    ]


def _other_scores(content: CardContent) -> list[Score]:
    """Return the scores that `evaluate` has measured, with their intervals."""
    return [
        Score(
            Path(found.file).name,
            format_count(found.rows),
            name,
            _four(metric.value),
            " to ".join(_four(end) for end in metric.interval) if metric.interval else NOTHING,
        )
        for found in content.evaluations
        for name, metric in found.metrics.items()
    ]


def _score_note(content: CardContent) -> str:
    best, metrics = _kept(content), content.run.metrics or MetricsBlock()
    if best is None:
        return f"{content.record.source} of a run that has not finished."
    text = f"Step {format_count(best.step)}. The validation data has also chosen the step."
    if metrics.test is not None:
        text = f"Step {format_count(best.step)}, chosen on held-out training rows."
    elif metrics.final is not None and metrics.final.step == best.step:
        text = f"Step {format_count(best.step)}, the last."
    if content.task.baseline is not None:
        answer, score = content.task.baseline
        text += f" Always giving the {answer} scores {_four(score)} ({content.task.metric})."
    if content.evaluations:
        text += " Intervals are Wilson's for shares of the rows, else of a bootstrap over rows."
    return text


def _four(value: float | None) -> str:
    return format_number(value, 4)


def _facts(content: CardContent) -> list[tuple[str, str]]:
    record, run = content.record, content.run
    model, task = record.model, content.task
    quantized = f", quantized to {model.quantization}" if model.quantization else ""
    title = base_title(model.name)
    rows = [f"{format_count(task.train_examples)} training rows"]
    measured = task.validation_examples | task.test_examples
    rows += [f"{format_count(n)} of {split}" for split, n in measured.items()]
    facts = [
        ("Base model", f"{title} ({model.architecture}, {model.dtype}{quantized})"),
        ("Data", f"{content.data}: {', '.join(rows)}"),
        ("Digest of the data", str((run.hashes or HashesBlock()).data)),
    ]
    if content.labels:
        names = ", ".join(f"{n}: {label}" for n, label in content.labels.items())
        facts.append(("Labels", names))
    if record.label_threshold is not None:
        value = format_number(record.label_threshold, 4)
        facts.append(
            ("Label threshold", f"a text has the labels with a probability from {value} on")
        )
    facts += [("Method", _method(content)), ("Trained parameters", _trained(content))]
    facts += [("Steps", _steps(content)), ("Peak memory", _memory(run))]
    if FORMS[record.to].has_rank:
        truncated = ", truncated" if record.truncated else ""
        error = format_number(record.error, 3)
        facts.append(("LoRA rank", f"{record.rank}{truncated}; error {error} of the change"))
    versions = [f"{name} {version}" for name, version in record.versions.items() if version]
    return [*facts, ("Versions", ", ".join(versions))]


def _method(content: CardContent) -> str:
    """Return the method with its settings; a list of modules is not repeated."""
    block = content.run.method or MethodBlock(name="?")
    settings = {
        name: value
        for name, value in block.settings.items()
        if isinstance(value, str | int | float) and not _is_path(value)
    }
    shown = [f"{name} {str(value).lower()}" for name, value in settings.items()]
    return "; ".join([block.name, f"scope {content.record.scope}", *shown])


def _is_path(value: object) -> bool:
    return isinstance(value, str) and "/" in value


def _trained(content: CardContent) -> str:
    counts = content.run.counts or CountsBlock()
    total, trained = format_count(counts.model_parameters), format_count(counts.trainable)
    parts = [
        f"{format_count(number)} in {where}"
        for where, number in (
            ("target modules", counts.trainable_targets),
            ("the head", counts.trainable_head),
            ("other modules", counts.trainable_rest),
        )
        if number
    ]
    note = f"; {counts.note}" if counts.note else ""  # Such as the rank that was solved for.
    return f"{trained} of {total} per step ({', '.join(parts)}){note}"


def _steps(content: CardContent) -> str:
    run = content.run
    memory, time = run.memory or MemoryBlock(), run.time or TimeBlock()
    final = run.metrics.final if run.metrics else None
    parts = [f"{format_count(time.steps)} steps"]
    if final is not None and final.epoch is not None:
        parts.append(f"{final.epoch:.3g} epochs")
    if memory.batch_shape:
        parts.append(f"{memory.batch_shape[0]} rows a batch")
    if run.optimizer is not None:
        rates = sorted(
            {group.learning_rate for group in run.optimizer.groups if group.learning_rate}
        )
        parts.append(f"{run.optimizer.name}, learning rate {', '.join(f'{r:g}' for r in rates)}")
    return ", ".join([*parts, f"seed {run.seed}"])


def _memory(run: RunRecord) -> str:
    memory = run.memory or MemoryBlock()
    phase = f" in {memory.peak_phase}" if memory.peak_phase else ""
    return f"{format_bytes(memory.peak_bytes)}{phase}, on {memory.device or 'an unknown device'}"


def _limits(content: CardContent) -> list[str]:
    """Return what a user must not expect of the model."""
    task, limits = content.task, []
    if task.max_length:
        limits.append(
            f"It was trained on at most {task.max_length} tokens of a text; what it makes of "
            "longer ones was not measured."
        )
    limits.append("It was measured on the data named above only. Other texts may be unlike them.")
    if content.labels and not task.regression and not _many_labels(task):
        limits.append("It gives every text one of its classes, also a text to which none applies.")
    limits.append("It keeps the faults and biases of its base model and of its data.")
    if content.record.truncated:
        limits.append("Its rank was truncated, so it is not exactly the model that was trained.")
    return limits


def _source(title: str, base: BaseModel) -> str:
    """Return the name by which another machine finds the base model."""
    return f"PATH/TO/{title.rpartition(':')[2]}" if is_folder(base.source) else base.source


def _place(name: str, base: BaseModel) -> str:
    if name.startswith("builtin:"):
        return f"`{name}` of sparsegrad, a folder in a Python package or in sparsegrad's cache"
    if is_folder(base.source):
        return f"a local folder, `{base_title(name)}`, on which this model was trained"
    return f"`{name}` on the hub"


def _cell(text: object) -> str:
    """Escape text from records for one line of a Markdown table."""
    return printable_line(str(text)).replace("|", "\\|")
