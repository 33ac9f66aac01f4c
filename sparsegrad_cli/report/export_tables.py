"""What an export.json says, as facts."""

from __future__ import annotations

from typing import Any

from sparsegrad_cli.io.untrusted_text import printable_line
from sparsegrad_cli.report.access import block, dig, items, mappings, number, text
from sparsegrad_cli.report.tables import Fact
from sparsegrad_cli.report.units import format_bytes, format_count, format_number

_FORMS = {"merged": "merged model", "lora": "PEFT LoRA adapter", "adapter": "adapter"}


def export_title(record: Any) -> str:
    """What was made, in a word or two."""
    form = text(record, "to") or ""
    return _FORMS.get(form, form or "export")


def export_subtitle(record: Any) -> str:
    """What it was made of, in one line."""
    parts = [text(record, "run"), text(record, "source"), text(record, "model", "name")]
    method = [text(record, "method", key) for key in ("name", "form", "support")]
    parts.append(" ".join(word for word in method if word))
    return " · ".join(part for part in parts if part)


def export_facts(record: Any) -> list[Fact]:
    """The check, the error, the size."""
    check, judged = block(record, "check"), block(record, "check", "judged")
    difference = number(check, "difference")
    cut = text(judged, "against") == "the cut change"
    beside = "reported, not judged" if cut else f"at most {_small(number(judged, 'tolerance'))}"
    facts = [Fact("Logits differ by", _small(difference), f"{beside}; {_compared(check)}")]
    if cut:
        detail = f"at most {_small(number(judged, 'tolerance'))}"
        facts.append(Fact("from the cut change by", _small(number(judged, "difference")), detail))
    same, answers = number(check, "same_answers"), number(check, "answers")
    if same is not None:
        facts.append(Fact("Same answers", f"{same:.0f} of {format_count(answers)}"))
    prompts = number(check, "answers_alone", "prompts")
    if prompts is not None:
        stopped = number(check, "answers_alone", "stopped") or 0
        detail = f"text and stop as the run's, by transformers alone; {stopped:.0f} stopped"
        facts.append(Fact("Generated answers", f"{prompts:.0f}", detail))
    plain = number(check, "on_plain_base", "difference")
    if plain is not None:
        beside = "what quantizing it had changed: reported, not judged"
        facts.append(Fact("On the plain base by", _small(plain), beside))
    facts += _errors(record)
    names = ", ".join(sorted(map(printable_line, block(record, "files"))))
    facts.append(Fact("On disk", format_bytes(number(record, "bytes")), names))
    return facts


def _compared(check: Any) -> str:
    examples = format_count(number(check, "examples"))
    return f"on {examples} examples, logits up to {_small(number(check, 'largest_logit'))}"


def _errors(record: Any) -> list[Fact]:
    """What was lost: to rounding, or to a rank."""
    rounding, error = number(record, "rounding"), number(record, "error")
    if rounding is not None:
        detail = f"of the change, to {text(record, 'dtype')}"
        facts = [Fact("Rounded away", _small(rounding), detail)]
        layers = number(record, "dequantized")
        if layers:
            bits, dtype = text(record, "model", "quantization"), text(record, "dtype")
            facts.append(Fact("Dequantized", f"{layers:.0f} layers", f"{bits} to {dtype}"))
        return facts
    if error is None:
        return []
    ranks = sorted({number(row, "rank") or 0 for row in mappings(record, "targets")})
    common = number(record, "rank")
    shown = ", ".join(f"{rank:.0f}" for rank in (ranks if common is None else [common]))
    worst = max((number(row, "error") or 0.0 for row in mappings(record, "targets")), default=0.0)
    what = "cut off" if dig(record, "truncated") is True else "rounding alone"
    beside = f"{len(items(record, 'targets'))} targets"
    if common is not None and ranks and ranks != [common]:
        needed = " to ".join(f"{rank:.0f}" for rank in sorted({ranks[0], ranks[-1]}))
        beside += f" that need {needed}, the rest zeros"
    facts = [Fact("Rank", shown, beside)]
    detail = f"of the change (Frobenius), {what}; at most {_small(worst)} in a target"
    facts.append(Fact("Error", _small(error), detail))
    modules = items(record, "modules")
    if modules:
        facts.append(Fact("Whole modules", format_count(len(modules)), "in modules_to_save"))
    return facts


def _small(value: float | None) -> str:
    return format_number(value, 3)
