"""The model card of an export: what it was made of, how it scored, and how it is loaded.

It goes where the folder goes, so that no path of this machine is in it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsegrad_cli.export.base_model import BaseModel
from sparsegrad_cli.io.paths import is_folder
from sparsegrad_cli.io.untrusted_text import printable_line
from sparsegrad_cli.models.pretrained import locate
from sparsegrad_cli.recipe.tasks import FILE_TASKS
from sparsegrad_cli.report.access import block, dig, number, text
from sparsegrad_cli.report.units import format_count, format_number

CARD = "README.md"
_LIBRARIES = {"merged": "transformers", "lora": "peft", "adapter": "sparsegrad"}
_FORMS = {
    "merged": "a merged model in the format of transformers",
    "lora": "a LoRA adapter in the format of PEFT",
    "adapter": "an adapter in the format of sparsegrad",
}
_DATASETS = {"oasst": "OpenAssistant/oasst1", "glue": "nyu-mll/glue"}


def model_card(
    record: Mapping[str, Any], run: Mapping[str, Any], base: BaseModel, labels: Mapping[int, str]
) -> str:
    """The text of README.md.

    Args:
        record: export.json, without its files.
        run: run.json.
        base: how the base model is loaded.
        labels: of a classifier; empty for a language model.
    """
    name = base_title(str(dig(record, "model", "name")))
    task = str(text(run, "task", "name"))
    data = f"own data ({task})" if task in (*FILE_TASKS, "chat") else task
    lines = [*_metadata(record, run, labels), f"# {name}, fine-tuned on {data}", ""]
    lines += [_summary(record, name), ""]
    lines += ["| | |", "| --- | --- |"]
    lines += [f"| {what} | {_cell(said)} |" for what, said in _facts(record, run, name, labels)]
    lines += ["", "## How to load it", "", *_loading(record, base, labels), ""]
    lines += ["## Licence", "", _licence_words(record), ""]
    return "\n".join(lines)


def base_title(name: str) -> str:
    """A base model's name without the path of a local folder."""
    return Path(locate(name)).name if is_folder(name) else name


def licence_of(name: str) -> str | None:
    """The licence that the model card in a base model's folder names, or None."""
    folder = Path(locate(name))
    try:
        card = (folder / CARD).read_text(encoding="utf-8")[:20_000] if is_folder(folder) else ""
    except (OSError, ValueError):
        return None
    head = re.match(r"---\r?\n(.*?)^---", card, re.DOTALL | re.MULTILINE)
    found = re.search(r"^license:[ \t]*['\"]?([\w.-]+)", head[1], re.MULTILINE) if head else None
    return found[1] if found else None


def _metadata(
    record: Mapping[str, Any], run: Mapping[str, Any], labels: Mapping[int, str]
) -> list[str]:
    """The block that the hub reads."""
    base = str(dig(record, "model", "name"))
    form = str(record["to"])
    lines = ["---", f"license: {licence_of(base) or 'unknown'}"]
    if not is_folder(base) and not base.startswith("builtin:"):
        lines += [f"base_model: {base}"]
        lines += [f"base_model_relation: {'finetune' if form == 'merged' else 'adapter'}"]
    lines += [f"library_name: {_LIBRARIES[form]}"]
    lines += [f"pipeline_tag: {'text-classification' if labels else 'text-generation'}"]
    dataset = _DATASETS.get(str(text(run, "task", "name")).partition("/")[0])
    lines += ["datasets:", f"- {dataset}"] if dataset else []
    lines += ["metrics:", f"- {text(run, 'task', 'metric')}"] if labels else []
    return [*lines, "tags:", "- sparsegrad", f"- {dig(record, 'method', 'name')}", "---", ""]


def _summary(record: Mapping[str, Any], name: str) -> str:
    version = dig(record, "versions", "sparsegrad")
    return (
        f"This folder holds {_FORMS[str(record['to'])]}: {_cell(name)}, fine-tuned with sparsegrad "
        f"{version}. Its logits were compared with those of the trained model on "
        f"{format_count(number(record, 'check', 'examples'))} validation rows: they differ by at "
        f"most {format_number(number(record, 'check', 'difference'), 3)}."
    )


def _facts(
    record: Mapping[str, Any], run: Mapping[str, Any], name: str, labels: Mapping[int, str]
) -> list[tuple[str, str]]:
    dtype, bits = text(record, "model", "dtype"), text(record, "model", "quantization")
    base = f"{name} ({text(record, 'model', 'architecture')}, {dtype}"
    facts = [("Base model", f"{base}{f', quantized to {bits}' if bits else ''})")]
    rows = [f"{format_count(number(run, 'task', 'train_examples'))} training rows"]
    for split, count in block(run, "task", "validation_examples").items():
        rows.append(f"{format_count(count)} of {printable_line(str(split))}")
    facts.append(("Data", f"{text(run, 'task', 'name')}: {', '.join(rows)}"))
    facts.append(("Digest of the data", str(text(run, "hashes", "data"))))
    if labels:
        shown = ", ".join(f"{number}: {printable_line(label)}" for number, label in labels.items())
        facts.append(("Labels", shown))
    facts.append(("Method", _method(record, run)))
    facts.append(("Score", _score(record, run)))
    if record["to"] == "lora":
        cut = ", cut to it" if record["truncated"] else ""
        error = format_number(number(record, "error"), 3)
        facts.append(("LoRA rank", f"{record['rank']}{cut}; error {error} of the change"))
    versions = block(record, "versions")
    facts.append(("Versions", ", ".join(f"{n} {v}" for n, v in versions.items() if v)))
    return facts


def _method(record: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    words = [text(record, "method", key) for key in ("name", "form", "support")]
    trained = number(run, "counts", "trainable")
    parts = [" ".join(word for word in words if word), f"scope {record['scope']}"]
    if trained is not None:
        total = number(run, "counts", "model_parameters")
        parts.append(f"{format_count(trained)} of {format_count(total)} parameters a step")
    parts.append(f"seed {run.get('seed')}")
    return ", ".join(parts)


def _score(record: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    best = block(run, "metrics", "best")
    if record["source"] != "adapter" or not best:
        return f"none: {record['source']} of a run that has not come to its end"
    scores = []
    for split, values in block(best, "values").items():
        listed = values.items() if isinstance(values, Mapping) else ()
        shown = ", ".join(f"{name} {format_number(value, 4)}" for name, value in listed)
        scores.append(f"{shown} on {split}")
    return f"{'; '.join(scores)} (step {format_count(number(best, 'step'))})"


def _loading(record: Mapping[str, Any], base: BaseModel, labels: Mapping[int, str]) -> list[str]:
    """Code that is typed in this folder."""
    auto, form = base.auto, record["to"]
    code = ["```python"]
    if form == "adapter":
        code += ["from sparsegrad_cli import load_adapter", "", 'model = load_adapter(".")', "```"]
        return [*code, "", f"It loads the base model by its name, {_place(record, base)}."]
    if form == "merged":
        code += [f"from transformers import {auto}, AutoTokenizer, pipeline", ""]
        code += [f'model = {auto}.from_pretrained(".")']
        code += ['tokenizer = AutoTokenizer.from_pretrained(".")']
        task = "text-classification" if labels else "text-generation"
        return [*code, f'pipe = pipeline("{task}", model=".")', "```"]
    bits = ", BitsAndBytesConfig" if base.quantization else ""
    code += ["from peft import PeftModel", f"from transformers import {auto}, AutoTokenizer{bits}"]
    here = BaseModel(auto, "BASE", base.words, base.quantization).snippet.replace('"BASE"', "base")
    code += ["", f"base = {_source(record, base)!r}"]
    code += [f'model = PeftModel.from_pretrained({here}, ".")']
    code += ['tokenizer = AutoTokenizer.from_pretrained(".")', "```"]
    return [*code, "", f"`base` is {_place(record, base)}.", *_by_folder(base, labels)]


def _by_folder(base: BaseModel, labels: Mapping[int, str]) -> list[str]:
    """How the folder alone is named: by the base model's place in adapter_config.json."""
    kept = ("id2label", "label2id", "problem_type", "pad_token_id", "ignore_mismatched_sizes")
    words = {name: base.words[name] for name in kept if name in base.words}
    said = "".join(f", {name}={value!r}" for name, value in words.items())
    lines = [
        "",
        "Where the base model lies as `base_model_name_or_path` in adapter_config.json says, the "
        "folder's name is enough:",
        "",
        "```python",
    ]
    if not labels:
        lines += ["from transformers import pipeline", ""]
        return [*lines, 'pipe = pipeline("text-generation", model=".")', "```"]
    lines += ["from peft import AutoPeftModelForSequenceClassification"]
    lines += ["from transformers import pipeline", ""]
    lines += [f'model = AutoPeftModelForSequenceClassification.from_pretrained("."{said})']
    lines += [f'pipe = pipeline("text-classification", model=".", model_kwargs={words!r})', "```"]
    return [
        *lines,
        "",
        "Without these words both take the labels of the base model's own configuration: an "
        "adapter's folder has no place for them.",
    ]


def _source(record: Mapping[str, Any], base: BaseModel) -> str:
    """What stands for the base model where it is no longer this machine's."""
    name = str(dig(record, "model", "name"))
    title = base_title(name).rpartition(":")[2]
    return f"PATH/TO/{title}" if is_folder(base.source) else base.source


def _place(record: Mapping[str, Any], base: BaseModel) -> str:
    name = str(dig(record, "model", "name"))
    if name.startswith("builtin:"):
        return f"`{name}` of sparsegrad, a folder of the package that carries it"
    if is_folder(base.source):
        return f"a local folder, `{base_title(name)}`, that this one was trained on"
    return f"`{name}` on the hub"


def _licence_words(record: Mapping[str, Any]) -> str:
    found = licence_of(str(dig(record, "model", "name")))
    if found is None:
        return (
            "Unknown: the files of the base model name no licence. That of the base model and of "
            "the data apply; put it into the field `license` above."
        )
    return f"That of the base model, {found}, as its model card names it; and that of the data."


def _cell(said: str) -> str:
    return " ".join(said.split()).replace("|", "\\|")
