"""The forms of an export: how each is written and loaded back, and what is true of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad_cli.export.adapter import write_adapter
from sparsegrad_cli.export.base_model import LANGUAGE_MODEL, BaseModel, auto_class, plain_model
from sparsegrad_cli.export.check_answers import Loading
from sparsegrad_cli.export.check_logits import logits_of
from sparsegrad_cli.export.hub_upload import HubTarget
from sparsegrad_cli.export.lora import (
    SERVER_RANKS,
    LoraParts,
    load_lora,
    lora_parts,
    reference,
    write_lora,
)
from sparsegrad_cli.export.merged import load_merged, merge, write_merged
from sparsegrad_cli.models.quantized import rounds_in_evaluation
from sparsegrad_cli.report.units import format_bytes
from sparsegrad_cli.restore.exported_adapter import load_adapter
from sparsegrad_cli.restore.restore import TrainedModel

# Above this share, a note states how much of the change is lost to rounding.
_NOTED_ROUNDING = 0.05


@dataclass(frozen=True)
class ExportOptions:
    """What to export, and where.

    Attributes:
        to: A key of ``FORMS``.
        output_dir: RUN/export-<to> by default.
        rank: lora: truncate every change to this rank.
        examples: Number of validation rows to compare logits on.
        tolerance: Largest absolute difference of logits; the default allows for rounding.
        overwrite: Replace an earlier export in ``output_dir``.
        server_rank: lora: pad with zeros to one of ``SERVER_RANKS``; truncate to the highest.
        hub: The repository on the Hugging Face Hub that it is pushed to.
    """

    to: str
    output_dir: Path | None = None
    rank: int | None = None
    examples: int = 32
    tolerance: float | None = None
    overwrite: bool = False
    server_rank: bool = False
    hub: HubTarget | None = None


@dataclass(frozen=True)
class ExportJob:
    """One export.

    Attributes:
        trained: The run's model.
        partial: The temporary folder to write.
        folder: The final output folder.
        options: What the user asked for.
        batches: Validation rows to compare logits on.
    """

    trained: TrainedModel
    partial: Path
    folder: Path
    options: ExportOptions
    batches: Sequence[dict[str, Tensor]]

    @property
    def device(self) -> torch.device:
        """The device of the run's model."""
        return self.trained.setup.device

    @property
    def base(self) -> BaseModel:
        """How users load the run's base model."""
        return BaseModel.of(self.trained.recipe.model, self.trained.setup.model)


@dataclass
class Written:
    """What was written, and how to load it back.

    Attributes:
        details: Entries of export.json.
        load: Loads the folder without using the run.
        snippet: The same for users, as a line of Python.
        truncated_logits: Logits of a truncated change, which the folder must reproduce.
        rounded: Whether the inputs of the products are rounded in only one of the two models.
        on_plain_base: Loads the folder onto the base model before quantization.
        as_trained: Whether it computes with the form and the autocast of training.
        loading: How another process loads the folder of a language model.
        notes: What the user should know.
    """

    details: dict[str, Any]
    load: Callable[[], nn.Module]
    snippet: str
    truncated_logits: list[Tensor] | None = None
    rounded: bool = False
    on_plain_base: Callable[[], nn.Module] | None = None
    as_trained: bool = False
    loading: Loading | None = None
    notes: list[str] = field(default_factory=list)


def write_merged_form(job: ExportJob) -> Written:
    """Write a model of transformers with the change merged into its weights."""
    trained, partial, device = job.trained, job.partial, job.device
    plain, details = merge(trained)
    write_merged(plain, trained.setup.tokenizer, partial)
    auto, section = auto_class(plain), trained.recipe.model
    trust = section.trust_remote_code
    notes = []
    if details["rounding"] > _NOTED_ROUNDING:
        notes.append(
            f"{details['dtype']} rounds away {details['rounding']:.0%} of the change; --to lora "
            "keeps it apart from the weights, without rounding"
        )
    if details["dequantized"]:
        notes.append(
            f"{details['dequantized']} layers are no longer in {section.quantization}: they are "
            f"written in {details['dtype']}"
        )
    return Written(
        details,
        lambda: load_merged(auto, partial, trust_remote_code=trust).to(device),
        f'{auto}.from_pretrained("{job.folder}")',
        # On the CPU, 8-bit products do not round their inputs.
        rounded=section.quantization == "8bit" and device.type != "cpu",
        loading=_loading(auto, partial, None, {"trust_remote_code": trust}),
        notes=notes,
    )


def write_lora_form(job: ExportJob) -> Written:
    """Write a PEFT folder with low-rank factors of the change."""
    trained, partial, device, base = job.trained, job.partial, job.device, job.base
    plain = plain_model(trained)
    rank, server_rank = job.options.rank, job.options.server_rank
    parts = lora_parts(trained, plain, rank=rank, server_rank=server_rank)
    write_lora(plain, parts, trained, base, partial)
    del plain
    logits = logits_of(reference(trained, parts), job.batches) if parts.truncated else None
    quantized = trained.recipe.model.quantization is not None
    return Written(
        parts.record,
        lambda: load_lora(base, partial, device),
        f'PeftModel.from_pretrained({base.snippet}, "{job.folder}")',
        truncated_logits=logits,
        rounded=rounds_in_evaluation(trained.setup.model, device),
        on_plain_base=(lambda: load_lora(base.plain, partial, device)) if quantized else None,
        loading=_loading(base.auto, partial, base, base.arguments),
        notes=_server_notes(parts, base.auto),
    )


def write_adapter_form(job: ExportJob) -> Written:
    """Write an adapter of sparsegrad: values, positions and bases."""
    trained, partial, device = job.trained, job.partial, job.device
    details = write_adapter(trained, plain_model(trained), partial)
    section = trained.recipe.model
    notes = []
    weights = sum(target.size for target in trained.setup.targets)
    if details["bases_bytes"] > weights * getattr(torch, section.dtype).itemsize:
        size = format_bytes(details["bases_bytes"])
        notes.append(
            f"the bases take {size}, more than the weights of the targets: --to merged is smaller"
        )
    trust = section.trust_remote_code
    return Written(
        details,
        lambda: load_adapter(partial, device=device, trust_remote_code=trust),
        f'sparsegrad_cli.load_adapter("{job.folder}")',
        as_trained=True,
        notes=notes,
    )


def _server_notes(parts: LoraParts, auto: str) -> list[str]:
    """Return notes about parts of the folder that vLLM or llama.cpp do not support."""
    if auto != LANGUAGE_MODEL:
        return []
    notes = []
    if parts.rank > SERVER_RANKS[-1]:
        notes.append(
            f"vLLM supports ranks up to {SERVER_RANKS[-1]}, and this one is {parts.rank}: "
            "--server-rank truncates to that (the error is stated), --to merged loses nothing"
        )
    beside = [*parts.modules, *(["biases of targets"] if parts.biases else [])]
    if beside:
        more = f" and {len(beside) - 1} more" if len(beside) > 1 else ""
        notes.append(
            f"the folder holds more than low-rank factors ({beside[0]}{more}), which vLLM and "
            "llama.cpp do not support: use --to merged for them"
        )
    return notes


def _loading(
    auto: str, partial: Path, base: BaseModel | None, arguments: dict[str, Any]
) -> Loading | None:
    """Return how another process loads a language model's folder, onto its base if it has one."""
    if auto != LANGUAGE_MODEL:
        return None
    folder = str(partial)
    bits = base.quantization if base else {}
    source = base.source if base else folder
    return Loading(folder, source, arguments, bits, adapter=base is not None)


@dataclass(frozen=True)
class Form:
    """A form that a run can be exported to.

    Attributes:
        write: Writes it.
        words: What the folder holds, for the model card.
        library: The library that loads it, by its name on the hub.
        whole: Whether the folder holds a whole model; otherwise it needs the base model.
        has_rank: Whether it holds factors, whose rank ``--rank`` limits.
    """

    write: Callable[[ExportJob], Written]
    words: str
    library: str
    whole: bool = False
    has_rank: bool = False

    @property
    def is_foreign(self) -> bool:
        """Whether other libraries load it without this package."""
        return self.library != "sparsegrad"


FORMS = {
    "merged": Form(
        write_merged_form,
        "a merged model in the format of transformers",
        library="transformers",
        whole=True,
    ),
    "lora": Form(
        write_lora_form, "a LoRA adapter in the format of PEFT", library="peft", has_rank=True
    ),
    "adapter": Form(
        write_adapter_form, "an adapter in the format of sparsegrad", library="sparsegrad"
    ),
}
