"""The forms that a run can be exported to: each written, and a way to read it back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad_cli.export.adapter import load_adapter, write_adapter
from sparsegrad_cli.export.base_model import BaseModel, load_lora
from sparsegrad_cli.export.check_answers import Loading
from sparsegrad_cli.export.check_logits import logits_of
from sparsegrad_cli.export.lora import LoraParts, lora_parts, reference, write_lora
from sparsegrad_cli.export.merged import (
    auto_class,
    load_plain,
    merge,
    plain_model,
    with_stop_tokens,
    write_plain,
)
from sparsegrad_cli.export.options import SERVER_RANKS, ExportOptions
from sparsegrad_cli.export.rebuild import Trained
from sparsegrad_cli.models.quantized import rounds_in_evaluation
from sparsegrad_cli.report.units import format_bytes

# Above this share of the change, what rounding takes away is worth a word.
_ROUNDED_AWAY = 0.05


@dataclass
class Written:
    """What was written, and how to read it again.

    Attributes:
        details: for export.json.
        load: the folder's model, by libraries that know nothing of the run.
        snippet: the same in the user's words.
        cut: logits of a change that was cut, which the folder must give exactly.
        rounded: one side's products round x, and the other's do not.
        on_plain: the folder on the base model as it was before it was quantized.
        as_trained: it is the form it was trained in, and computes under autocast if that did.
        loading: how a process of its own loads the folder of a language model.
        notes: what the user should know.
    """

    details: dict[str, Any]
    load: Callable[[], nn.Module]
    snippet: str
    cut: list[Tensor] | None = None
    rounded: bool = False
    on_plain: Callable[[], nn.Module] | None = None
    as_trained: bool = False
    loading: Loading | None = None
    notes: list[str] = field(default_factory=list)


def _merged(
    trained: Trained, partial: Path, folder: Path, options: ExportOptions, batches: Any
) -> Written:
    plain, details = merge(trained)
    write_plain(plain, trained, partial)
    auto, device = auto_class(plain), trained.setup.device
    trust = trained.recipe.model.trust_remote_code
    notes = []
    if details["rounding"] > _ROUNDED_AWAY:
        notes.append(
            f"{details['dtype']} rounds away {details['rounding']:.0%} of the change: "
            "--to lora keeps it apart from the weights, unrounded"
        )
    if details["dequantized"]:
        notes.append(
            f"{details['dequantized']} layers are plain again, in {details['dtype']}: "
            f"{trained.recipe.model.quantization} no more"
        )
    return Written(
        details,
        lambda: load_plain(auto, partial, trust_remote_code=trust).to(device),
        f'{auto}.from_pretrained("{folder}")',
        # On the CPU an 8-bit product takes x as it is.
        rounded=trained.recipe.model.quantization == "8bit" and device.type != "cpu",
        loading=_loading(auto, partial, None, {"trust_remote_code": trust}),
        notes=notes,
    )


def _lora(
    trained: Trained, partial: Path, folder: Path, options: ExportOptions, batches: Any
) -> Written:
    section, device = trained.recipe.model, trained.setup.device
    base = BaseModel.of(section, trained.setup.model)
    plain = plain_model(trained)
    parts = lora_parts(trained, plain, options.rank, server=options.server_rank)
    write_lora(plain, parts, trained, base, partial)
    if base.auto == "AutoModelForCausalLM":
        with_stop_tokens(plain, trained.setup.tokenizer).save_pretrained(partial)
    del plain
    written = Written(
        parts.record,
        lambda: load_lora(base, partial, device),
        f'PeftModel.from_pretrained({base.snippet}, "{folder}")',
        logits_of(reference(trained, parts), batches) if parts.truncated else None,
        rounded=rounds_in_evaluation(trained.setup.model, device),
        loading=_loading(base.auto, partial, base, base.words),
    )
    written.notes += _for_servers(parts, auto_class(trained.setup.model))
    if section.quantization is not None:
        written.on_plain = lambda: load_lora(base.plain, partial, device)
    return written


def _for_servers(parts: LoraParts, auto: str) -> list[str]:
    """What servers such as vLLM do not take of a language model's folder."""
    if auto != "AutoModelForCausalLM":
        return []
    notes = []
    if parts.rank > SERVER_RANKS[-1]:
        notes.append(
            f"vLLM takes ranks up to {SERVER_RANKS[-1]}, and this is {parts.rank}: --server-rank "
            "cuts it to that (the error is stated), --to merged loses nothing"
        )
    beside = [*parts.modules, *(["biases of targets"] if parts.biases else [])]
    if beside:
        more = f" and {len(beside) - 1} more" if len(beside) > 1 else ""
        notes.append(
            f"the folder holds more than factors ({beside[0]}{more}), which vLLM and llama.cpp do "
            "not take: --to merged is for them"
        )
    return notes


def _loading(
    auto: str, partial: Path, base: BaseModel | None, words: dict[str, Any]
) -> Loading | None:
    """How a process of its own loads the folder, on its base model where it has one."""
    if auto != "AutoModelForCausalLM":
        return None
    folder = str(partial)
    bits = base.quantization if base else {}
    return Loading(folder, base.source if base else folder, words, bits, adapter=base is not None)


def _adapter(
    trained: Trained, partial: Path, folder: Path, options: ExportOptions, batches: Any
) -> Written:
    details = write_adapter(trained, plain_model(trained), partial)
    notes = []
    weights = sum(target.size for target in trained.setup.targets)
    if details["bases_bytes"] > weights * getattr(torch, trained.recipe.model.dtype).itemsize:
        size = format_bytes(details["bases_bytes"])
        notes.append(
            f"its bases take {size}, more than the targets' weights: --to merged is smaller"
        )
    device, trust = trained.setup.device, trained.recipe.model.trust_remote_code
    return Written(
        details,
        lambda: load_adapter(partial, device=device, trust_remote_code=trust),
        f'sparsegrad_cli.load_adapter("{folder}")',
        as_trained=True,
        notes=notes,
    )


WRITERS = {"merged": _merged, "lora": _lora, "adapter": _adapter}
