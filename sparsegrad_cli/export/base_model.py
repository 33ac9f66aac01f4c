"""How the base model of a LoRA folder is loaded: said in one line, and checked by what it says."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsegrad_cli.export.merged import auto_class, task_settings
from sparsegrad_cli.io.paths import is_folder
from sparsegrad_cli.models.pretrained import (
    base_name,
    from_pretrained,
    load_configuration,
    locate,
)
from sparsegrad_cli.models.quantized import placed, quantization_words
from sparsegrad_cli.recipe.schema import ModelSection


@dataclass(frozen=True)
class BaseModel:
    """What a user writes to load it.

    Attributes:
        auto: the Auto class of transformers.
        source: a hub id or a whole path.
        words: arguments of its ``from_pretrained``: plain values.
        quantization: arguments of BitsAndBytesConfig; empty where nothing is quantized.
    """

    auto: str
    source: str
    words: dict[str, Any]
    quantization: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, section: ModelSection, model: nn.Module) -> BaseModel:
        """That of a run.

        Args:
            model: the run's.
        """
        auto, source = auto_class(model), locate(base_name(section))
        words: dict[str, Any] = {}
        if "Sequence" in auto:
            task, stored = task_settings(model), load_configuration(section)
            names = ("id2label", "label2id")
            if any(task[name] != getattr(stored, name) for name in names):
                words |= {name: task[name] for name in names}  # they say how many, too
            # By it a pipeline knows a score from a probability.
            kind = getattr(stored, "problem_type", None)
            if task["problem_type"] != kind and (kind or task["problem_type"] == "regression"):
                words["problem_type"] = task["problem_type"]
            # Without one, GPT-2 and its kin take no batch of two.
            if task["pad_token_id"] != getattr(stored, "pad_token_id", None):
                words["pad_token_id"] = task["pad_token_id"]
            kinds = getattr(stored, "architectures", None) or ()
            heads = any(str(kind).endswith("ForSequenceClassification") for kind in kinds)
            if heads and stored.num_labels != task["num_labels"]:
                words["ignore_mismatched_sizes"] = True
        # Unsaid, it is that of the files, or float32, as the version of transformers has it.
        words["dtype"] = section.dtype
        if section.revision is not None and not is_folder(source):
            words["revision"] = section.revision
        if section.trust_remote_code:
            words["trust_remote_code"] = True
        bits = quantization_words(model) if section.quantization is not None else {}
        return cls(auto, source, words, bits)

    @property
    def plain(self) -> BaseModel:
        """The same, not quantized."""
        return replace(self, quantization={})

    @property
    def snippet(self) -> str:
        """The call, as it is typed."""
        said = [f'"{self.source}"', *(f"{name}={value!r}" for name, value in self.words.items())]
        if self.quantization:
            bits = ", ".join(f"{name}={value!r}" for name, value in self.quantization.items())
            said.append(f"quantization_config=BitsAndBytesConfig({bits})")
        return f"{self.auto}.from_pretrained({', '.join(said)})"

    def load(self, device: torch.device | str) -> nn.Module:
        """What the line loads, on a device.

        Raises:
            DownloadError, FileFormatError: as :func:`from_pretrained`.
        """
        import transformers

        # from_pretrained says the revision and whose code is run, by the section.
        own = {name: self.words.get(name) for name in ("revision", "trust_remote_code")}
        section = ModelSection(
            name=self.source,
            revision=own["revision"],
            trust_remote_code=bool(own["trust_remote_code"]),
        )
        more: dict[str, Any] = {k: v for k, v in self.words.items() if k not in own}
        if self.quantization:
            bits: Any = transformers.BitsAndBytesConfig
            more["quantization_config"] = bits(**self.quantization)
            more["device_map"] = {"": device}  # it cannot be moved there
        load = getattr(transformers, self.auto).from_pretrained
        model = from_pretrained(load, section, what="model", use_safetensors=True, **more)
        return placed(model.eval(), device)


def load_lora(base: BaseModel, folder: Path, device: torch.device | str = "cpu") -> nn.Module:
    """Load a written folder as anyone would: by peft, onto the base model."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded: Any = PeftModel.from_pretrained(base.load(device), str(folder))
    return placed(loaded, device)
