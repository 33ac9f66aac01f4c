"""Show an export: its comparison with the run, its losses, its size, and how to load it."""

from __future__ import annotations

from dataclasses import replace

from sparsegrad_cli.records.export import ExportCheck, ExportedTarget, ExportRecord, HubUpload
from sparsegrad_cli.report.document import (
    Block,
    Bullets,
    Column,
    Command,
    Commands,
    Document,
    Fact,
    Facts,
    Labelled,
    Section,
    Table,
    Verdict,
)
from sparsegrad_cli.report.headline import export_headline
from sparsegrad_cli.report.next_steps import export_next
from sparsegrad_cli.report.run import short_notes
from sparsegrad_cli.report.units import (
    counted,
    format_bytes,
    format_count,
    format_number,
    words,
)

_FORMS = {"merged": "merged model", "lora": "PEFT LoRA adapter", "adapter": "adapter"}


def export_screen(record: ExportRecord) -> Document:
    """Return the facts of an export."""
    method = record.method
    names = (method.name, method.form, method.support) if method else ()
    parts = [record.run, record.source, record.model.name, " ".join(n for n in names if n)]
    facts = [*_check(record.check or ExportCheck()), *_losses(record)]
    facts.append(Fact("On disk", format_bytes(record.bytes), ", ".join(sorted(record.files))))
    return Document(
        title=_FORMS[record.to],
        status="checked",
        subtitle=" · ".join(part for part in parts if part),
        lead=[
            Verdict(export_headline(record)),
            Facts("Export", facts),
            _loading(record),
            *([_pushed(record.hub)] if record.hub else []),
            *short_notes(record.notes),
        ],
    )


def _loading(record: ExportRecord) -> Block:
    """Return the lines that load the export, to be copied."""
    if record.load is None:
        return Labelled("load", words(record.load))
    pipeline = [Command(record.pipeline, "pipeline")] if record.pipeline else []
    return Commands([Command(record.load, "load"), *pipeline])


def export_document(record: ExportRecord) -> Document:
    """Return the report of an export: the facts, and every target module's error."""
    screen = export_screen(record)
    return replace(
        screen,
        lead=screen.lead[:2],
        sections=[
            Section("Target modules", [_target_table(record)]),
            export_next(record),
            Section("Files", [_file_table(record)]),
            Section("Notes", [Bullets(record.notes)]),
        ],
    )


def _target_table(record: ExportRecord) -> Table | None:
    columns: list[Column[ExportedTarget]] = [
        Column("target", lambda t: t.name, words=True),
        Column("rank", lambda t: format_count(t.rank)),
        Column("error, share of the change", lambda t: format_number(t.error)),
        Column("rounding, share of the change", lambda t: format_number(t.rounding)),
        Column("largest rounding of a weight", lambda t: format_number(t.rounding_max)),
    ]
    if not record.targets:
        return None
    return Table.of(record.targets, columns, "What was lost in each target module").without_empty()


def _file_table(record: ExportRecord) -> Table | None:
    columns: list[Column[tuple[str, int]]] = [
        Column("file", lambda row: row[0], words=True),
        Column("size", lambda row: format_bytes(row[1])),
    ]
    return Table.of(sorted(record.files.items()), columns, "Files") if record.files else None


def _pushed(hub: HubUpload) -> Labelled:
    visible = "public" if hub.public else "private"
    return Labelled("pushed", f"{hub.url} ({visible}, {counted(len(hub.files), 'file')})")


def _check(check: ExportCheck) -> list[Fact]:
    """Return the agreement of the exported model with the run."""
    judged = check.judged
    cut = judged is not None and judged.against == "the cut change"
    limit = f"at most {format_number(judged.tolerance if judged else None)}"
    logits = f"logits up to {format_number(check.largest_logit)}"
    compared = f"on {format_count(check.examples)} examples, {logits}"
    beside = "reported, not tested" if cut else limit
    facts = [Fact("Logits differ by", format_number(check.difference), f"{beside}; {compared}")]
    if judged and cut:
        facts.append(Fact("from the truncated change by", format_number(judged.difference), limit))
    if check.same_answers is not None:
        same = f"{format_count(check.same_answers)} of {format_count(check.answers)}"
        facts.append(Fact("Same answers", same))
    if check.answers_alone:
        stopped = format_count(check.answers_alone.stopped)
        detail = f"same text and stop as the run, by transformers alone; {stopped} stopped"
        prompts = format_count(check.answers_alone.prompts)
        facts.append(Fact("Generated answers", prompts, detail))
    if check.on_plain_base and check.on_plain_base.difference is not None:
        detail = "the effect of quantizing the base model: reported, not tested"
        plain = format_number(check.on_plain_base.difference)
        facts.append(Fact("On the unquantized base model by", plain, detail))
    return facts


def _losses(record: ExportRecord) -> list[Fact]:
    """Return the errors from rounding or from a lower rank."""
    if record.rounding is not None:
        rounded = format_number(record.rounding)
        facts = [Fact("Rounded away", rounded, f"of the change, to {words(record.dtype)}")]
        if record.dequantized:
            layers, bits = counted(record.dequantized, "layer"), words(record.model.quantization)
            facts.append(Fact("Dequantized", layers, f"{bits} to {words(record.dtype)}"))
        return facts
    if record.error is None:
        return []
    lost = "truncated" if record.truncated else "rounding only"
    worst = max((target.error or 0.0 for target in record.targets), default=0.0)
    detail = f"of the change (Frobenius), {lost}; at most {format_number(worst)} in a target"
    facts = [_rank(record), Fact("Error", format_number(record.error), detail)]
    if record.modules:
        facts.append(Fact("Whole modules", format_count(len(record.modules)), "in modules_to_save"))
    return facts


def _rank(record: ExportRecord) -> Fact:
    ranks = sorted({target.rank or 0 for target in record.targets})
    shown = ranks if record.rank is None else [record.rank]
    detail = counted(len(record.targets), "target")
    if record.rank is not None and ranks and ranks != [record.rank]:
        needed = " to ".join(str(rank) for rank in sorted({ranks[0], ranks[-1]}))
        detail += f" that need {needed}, the rest zeros"
    return Fact("Rank", ", ".join(map(str, shown)), detail)
