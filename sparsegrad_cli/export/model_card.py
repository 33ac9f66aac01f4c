"""Write the model card of an export (model_card.md.jinja) without paths of this machine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from sparsegrad_cli.export.base_model import BaseModel
from sparsegrad_cli.export.forms import FORMS
from sparsegrad_cli.io.paths import is_folder
from sparsegrad_cli.io.untrusted_text import printable_line
from sparsegrad_cli.models.pretrained import locate
from sparsegrad_cli.recipe.tasks import FILE_TASKS
from sparsegrad_cli.records.export import ExportCheck, ExportedMethod, ExportRecord
from sparsegrad_cli.records.run import CountsBlock, Evaluation, HashesBlock, RunRecord, TaskBlock
from sparsegrad_cli.report.units import format_count, format_number

CARD = "README.md"
_DATASETS = {"oasst": "OpenAssistant/oasst1", "glue": "nyu-mll/glue"}
_LABEL_ARGUMENTS = (
    "id2label",
    "label2id",
    "problem_type",
    "pad_token_id",
    "ignore_mismatched_sizes",
)


def model_card(
    record: ExportRecord, run: RunRecord, base: BaseModel, labels: Mapping[int, str]
) -> str:
    """Render README.md.

    Args:
        record: export.json, without the files.
        run: run.json.
        base: How users load the base model.
        labels: The labels of a classifier; empty for a language model.
    """
    task = run.task or TaskBlock()
    check = record.check or ExportCheck()
    title = base_title(record.model.name)
    own_data = task.name in (*FILE_TASKS, "chat")
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
        form=FORMS[record.to].words,
        metadata=_metadata(record, task, labels),
        title=title,
        data=f"own data ({task.name})" if own_data else task.name,
        version=record.versions.get("sparsegrad"),
        examples=format_count(check.examples),
        difference=format_number(check.difference, 3),
        facts=_facts(record, run, labels),
        base=base,
        source=repr(_source(title, base)),
        place=_place(record.model.name, base),
        pipeline="text-classification" if labels else "text-generation",
        labels=labels,
        label_arguments={
            name: base.arguments[name] for name in _LABEL_ARGUMENTS if name in base.arguments
        },
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


def _metadata(record: ExportRecord, task: TaskBlock, labels: Mapping[int, str]) -> str:
    """Return the YAML block that the hub reads."""
    base = record.model.name
    metadata: dict[str, Any] = {"license": licence_of(base) or "unknown"}
    if not is_folder(base) and not base.startswith("builtin:"):
        metadata["base_model"] = base
        metadata["base_model_relation"] = "finetune" if FORMS[record.to].whole else "adapter"
    metadata["library_name"] = FORMS[record.to].library
    metadata["pipeline_tag"] = "text-classification" if labels else "text-generation"
    dataset = _DATASETS.get(str(task.name).partition("/")[0])
    if dataset:
        metadata["datasets"] = [dataset]
    if labels:
        metadata["metrics"] = [task.metric]
    method = record.method.name if record.method else None
    metadata["tags"] = ["sparsegrad", method]
    return yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)


def _facts(
    record: ExportRecord, run: RunRecord, labels: Mapping[int, str]
) -> list[tuple[str, str]]:
    model, task = record.model, run.task or TaskBlock()
    quantized = f", quantized to {model.quantization}" if model.quantization else ""
    title = base_title(model.name)
    rows = [f"{format_count(task.train_examples)} training rows"]
    rows += [f"{format_count(n)} of {split}" for split, n in task.validation_examples.items()]
    facts = [
        ("Base model", f"{title} ({model.architecture}, {model.dtype}{quantized})"),
        ("Data", f"{task.name}: {', '.join(rows)}"),
        ("Digest of the data", str((run.hashes or HashesBlock()).data)),
    ]
    if labels:
        facts.append(("Labels", ", ".join(f"{n}: {label}" for n, label in labels.items())))
    if record.label_threshold is not None:
        value = format_number(record.label_threshold, 4)
        facts.append(
            ("Label threshold", f"a text has the labels with a probability from {value} on")
        )
    facts += [("Method", _method(record, run)), ("Score", _score(record, run))]
    if FORMS[record.to].has_rank:
        truncated = ", truncated" if record.truncated else ""
        error = format_number(record.error, 3)
        facts.append(("LoRA rank", f"{record.rank}{truncated}; error {error} of the change"))
    versions = [f"{name} {version}" for name, version in record.versions.items() if version]
    return [*facts, ("Versions", ", ".join(versions))]


def _method(record: ExportRecord, run: RunRecord) -> str:
    method, counts = record.method or ExportedMethod(name="?"), run.counts or CountsBlock()
    parts = [" ".join(filter(None, (method.name, method.form, method.support)))]
    parts.append(f"scope {record.scope}")
    if counts.trainable is not None:
        trained, total = format_count(counts.trainable), format_count(counts.model_parameters)
        parts.append(f"{trained} of {total} parameters per step")
    parts.append(f"seed {run.seed}")
    return ", ".join(parts)


def _score(record: ExportRecord, run: RunRecord) -> str:
    best: Evaluation | None = run.metrics.best if run.metrics else None
    if record.source != "adapter" or best is None:
        return f"none: {record.source} of a run that has not finished"
    scores = []
    for split, values in best.values.items():
        shown = ", ".join(f"{name} {format_number(value, 4)}" for name, value in values.items())
        scores.append(f"{shown} on {split}")
    return f"{'; '.join(scores)} (step {format_count(best.step)})"


def _source(title: str, base: BaseModel) -> str:
    """Return the name by which another machine finds the base model."""
    return f"PATH/TO/{title.rpartition(':')[2]}" if is_folder(base.source) else base.source


def _place(name: str, base: BaseModel) -> str:
    if name.startswith("builtin:"):
        return f"`{name}` of sparsegrad, a folder of the package that contains it"
    if is_folder(base.source):
        return f"a local folder, `{base_title(name)}`, on which this model was trained"
    return f"`{name}` on the hub"


def _cell(text: object) -> str:
    """Escape text from records for one line of a Markdown table."""
    return printable_line(str(text)).replace("|", "\\|")
