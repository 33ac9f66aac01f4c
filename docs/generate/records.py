"""Write the reference of the records from their models."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sparsegrad_cli.records.answers import AnswerLine, AnswersRecord, JudgeRecord, JudgeVerdict
from sparsegrad_cli.records.base import SCHEMA, Unit
from sparsegrad_cli.records.basis import BasisMetadata
from sparsegrad_cli.records.estimate import EstimateRecord
from sparsegrad_cli.records.evaluation import EvaluationRecord
from sparsegrad_cli.records.export import ExportRecord
from sparsegrad_cli.records.run import Evaluation, RunRecord
from sparsegrad_cli.records.study import StudyRecord

_FILES: tuple[tuple[str, type[BaseModel], str], ...] = (
    (
        "run.json",
        RunRecord,
        "`train` and `calibrate` write it into the run's folder at every milestone. A resumed run "
        "keeps the earlier blocks until it replaces them. `steps.jsonl` beside it has one JSON "
        "object per line: `step`, `epoch`, `loss`, `learning_rate`, `steps_per_s` and `rss_bytes` "
        "for a logged step; `step`, `epoch` and `eval` (an "
        f"[{Evaluation.__name__}](#{Evaluation.__name__.lower()})) after an evaluation. "
        "[Example](run.example.json).",
    ),
    (
        "compare.json",
        StudyRecord,
        "`compare` writes it into the comparison's folder after every run. `sparsegrad report` "
        "computes `rows`, `tests` and `checks` again from `cells`. The formulas are in "
        "[Statistics of a comparison](../explanation/statistics.md). "
        "[Example](compare.example.json).",
    ),
    (
        "export.json",
        ExportRecord,
        "`export` writes it beside the exported files. It shows how they were checked.",
    ),
    (
        "evaluation.json",
        EvaluationRecord,
        "`evaluate --output-dir` writes it: how good a classifier is on the rows of a file.",
    ),
    (
        "answers/<questions>.json",
        AnswersRecord,
        "`generate` writes it into the folder of a comparison, for the answers of all its models "
        "to the same questions. [Example](answers.example.json).",
    ),
    (
        "Lines of answers (.jsonl)",
        AnswerLine,
        "`generate` writes one line for each question. The first line names the format.",
    ),
    (
        "judge.json",
        JudgeRecord,
        "`judge` writes it when all verdicts are there.",
    ),
    (
        "Lines of verdicts.jsonl",
        JudgeVerdict,
        "`judge` writes one line for each prompt, beside `judge.json`.",
    ),
    (
        "basis.safetensors",
        BasisMetadata,
        "The metadata of the file. All values are texts; `targets` and `settings` are JSON.",
    ),
    (
        "Output of `estimate --json`",
        EstimateRecord,
        "Nothing is written to disk.",
    ),
)

_INTRODUCTION = f"""# Records

Every command writes a record: a JSON file, from which reports are made. This page lists the keys of
each file. It is generated from `sparsegrad_cli/records/`; do not edit it
(`make reference` writes it again).

- Sizes are in bytes and times in seconds. Scores are fractions, correlations lie between -1 and 1,
  losses are in nats.
- NaN and infinities, which JSON does not have, are written as null.
- Any key that does not apply may be null or absent. A failed or running run has only the blocks
  that it has reached.
- `schema` is {SCHEMA}. It is raised when a key changes its meaning; keys may be added without that.
  A file is refused if it has another schema or a value of the wrong type.
"""


def page() -> str:
    """Return the page as Markdown."""
    parts = [_INTRODUCTION]
    shown: set[type[BaseModel]] = set()
    for name, model, words in _FILES:
        parts.append(f"## {name}\n\n{words}\n")
        parts.append(_table(model))
        shown.add(model)
        for block in _blocks(model):
            if block not in shown:
                shown.add(block)
                parts.append(f"### {block.__name__}\n\n{_first_paragraph(block)}\n")
                parts.append(_table(block))
    return "\n".join(parts)


def _blocks(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """Yield the models inside a model, those of a field before those of the next."""
    for field in model.model_fields.values():
        for block in _models_in(field.annotation):
            yield block
            yield from _blocks(block)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def _first_paragraph(block: type[BaseModel]) -> str:
    return " ".join((inspect.getdoc(block) or "").partition("\n\n")[0].split())


def _table(model: type[BaseModel]) -> str:
    rows = ["| key | value | meaning |", "| --- | --- | --- |"]
    for name, field in model.model_fields.items():
        (block, *_) = [*_models_in(field.annotation), None]
        meaning = _cell(field.description or (_first_paragraph(block) if block else ""))
        rows.append(f"| `{field.alias or name}` | {_cell(_value(field))} | {meaning} |")
    return "\n".join(rows) + "\n"


def _cell(text: str) -> str:
    return re.sub(r"(?<!\\)\|", r"\\|", text)


def _value(field: FieldInfo) -> str:
    """Return the type of a field in words, with its unit."""
    words = _type(field.annotation)
    units = [unit for unit in field.metadata if isinstance(unit, Unit)]
    return f"{words} ({units[0].name})" if units else words


def _type(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        units = [unit.name for unit in inner[1:] if isinstance(unit, Unit)]
        return " ".join([_type(inner[0]), *(f"({unit})" for unit in units)])
    if origin in (Union, UnionType):
        return " or ".join(_type(part) for part in inner if part is not NoneType)
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in inner)
    if origin is list:
        return f"list of {_type(inner[0])}"
    if origin is dict:
        return f"object: {_type(inner[1])} by {_type(inner[0])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{annotation.__name__}](#{_anchor(annotation)})"
    return _PLAIN.get(annotation, str(annotation))


def _anchor(model: type[BaseModel]) -> str:
    """Return the anchor of a model's section: a record's is named for its file."""
    heading = next((name for name, record, _ in _FILES if record is model), model.__name__)
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


_PLAIN = {
    str: "text",
    int: "integer",
    float: "number",
    bool: "true or false",
    Any: "any JSON value",
}
