"""Load the plain base model of a run and find the parameters that training changed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparsegrad_cli.errors import SparsegradError
from sparsegrad_cli.io.paths import is_folder
from sparsegrad_cli.models.load_model import reload_model
from sparsegrad_cli.models.pretrained import (
    base_name,
    from_pretrained,
    load_configuration,
    locate,
)
from sparsegrad_cli.models.quantized import (
    dequantized,
    move_model,
    quantization_arguments,
    quantized_layers,
)
from sparsegrad_cli.recipe.schema import ModelSection
from sparsegrad_cli.restore.restore import THRESHOLD

if TYPE_CHECKING:
    from sparsegrad_cli.restore.restore import TrainedModel

CLASSIFIER, LANGUAGE_MODEL = "AutoModelForSequenceClassification", "AutoModelForCausalLM"
# The Auto classes that can load an export, each with PEFT's name of its task.
PEFT_TASKS = {CLASSIFIER: "SEQ_CLS", LANGUAGE_MODEL: "CAUSAL_LM"}


def auto_class(model: nn.Module) -> str:
    """Return the Auto class of transformers that makes models of this class.

    Raises:
        SparsegradError: The model is neither a sequence classifier nor a causal language model.
    """
    mappings = {
        CLASSIFIER: transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        LANGUAGE_MODEL: transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
    }
    config: Any = model.config
    declared = getattr(config, "auto_map", None) or {}  # Of models with their own code.
    for name, mapping in mappings.items():
        known: Any = mapping.get(type(config), ())
        classes = known if isinstance(known, tuple | list) else (known,)
        if type(model) in classes or str(declared.get(name, "")).endswith(type(model).__name__):
            return name
    raise SparsegradError(
        f"expected a sequence classifier or a causal language model, got {type(model).__name__}: "
        "it cannot be exported"
    )


def task_settings(model: nn.Module) -> dict[str, Any]:
    """Return what a task adds to a base model's configuration: labels and a padding token."""
    config: Any = model.config
    return {
        "num_labels": len(config.id2label),
        "id2label": dict(config.id2label),
        "label2id": dict(config.label2id),
        "problem_type": getattr(config, "problem_type", None),
        "pad_token_id": getattr(config, "pad_token_id", None),
        THRESHOLD: getattr(config, THRESHOLD, None),
    }


def plain_model(trained: TrainedModel) -> nn.Module:
    """Load the base model once more, on the same device, in eval mode.

    Parameters that its files lack are drawn from a different seed, so that the check fails if an
    export does not contain them. Quantized layers become plain layers with the dequantized weights,
    on which the run was trained.
    """
    setup, recipe = trained.setup, trained.recipe
    section = recipe.model.model_copy(update={"quantization": None})
    plain = reload_model(section, setup.model, recipe.seed + 1).to(setup.device).eval()
    with torch.no_grad():
        for name, layer in quantized_layers(setup.model).items():
            weight = plain.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            weight_OI = weight.T if isinstance(plain.get_submodule(name), Conv1D) else weight
            weight_OI.copy_(dequantized(layer))
    return plain


def changed_parameters(plain: nn.Module, trained: TrainedModel) -> dict[str, Tensor]:
    """Return the parameters in which the run's model differs from the plain one, by plain name.

    The weights of target modules are left out. Parameters that were not trained are included if
    the base model's files lack them. Tied parameters are listed by each of their names.
    """
    weights = {f"{target.name}.weight" for target in trained.setup.targets}
    # The plain model was given the weights of quantized layers.
    weights |= {f"{name}.weight" for name in quantized_layers(trained.setup.model)}
    changed: dict[str, Tensor] = {}
    for name, parameter in plain.named_parameters(remove_duplicate=False):
        if name in weights:
            continue
        path, _, last = name.rpartition(".")
        # By attribute, not by name: PEFT's layers keep the bias one level deeper.
        ours = getattr(trained.setup.model.get_submodule(path), last)
        # Parameters that train among half-precision ones are float32: compare the values.
        if not torch.equal(ours.float(), parameter.float()):
            changed[name] = ours
    return changed


def put(plain: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy tensors into the parameters of the same names."""
    with torch.no_grad():
        for name, tensor in tensors.items():
            plain.get_parameter(name).copy_(tensor)


@dataclass(frozen=True)
class BaseModel:
    """The call of transformers by which users load a base model.

    Attributes:
        auto: The Auto class.
        source: A hub id or an absolute path.
        arguments: Plain keyword arguments of ``from_pretrained``.
        quantization: Arguments of BitsAndBytesConfig; empty if nothing is quantized.
    """

    auto: str
    source: str
    arguments: dict[str, Any]
    quantization: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, section: ModelSection, model: nn.Module) -> BaseModel:
        """Return the call for the base model of a run.

        Args:
            section: The run's settings of the model.
            model: The run's model.
        """
        auto, source = auto_class(model), locate(base_name(section))
        arguments = _label_arguments(section, model) if auto == CLASSIFIER else {}
        # Always given, since the default differs between versions of transformers.
        arguments["dtype"] = section.dtype
        if section.revision is not None and not is_folder(source):
            arguments["revision"] = section.revision
        if section.trust_remote_code:
            arguments["trust_remote_code"] = True
        bits = quantization_arguments(model) if section.quantization is not None else {}
        return cls(auto, source, arguments, bits)

    @property
    def plain(self) -> BaseModel:
        """The call for the same model without quantization."""
        return replace(self, quantization={})

    @property
    def snippet(self) -> str:
        """The call as a line of Python."""
        return self.call(f'"{self.source}"')

    def call(self, source: str) -> str:
        """Return the call as a line of Python, with an expression for the source."""
        given = [source, *(f"{name}={value!r}" for name, value in self.arguments.items())]
        if self.quantization:
            bits = ", ".join(f"{name}={value!r}" for name, value in self.quantization.items())
            given.append(f"quantization_config=BitsAndBytesConfig({bits})")
        return f"{self.auto}.from_pretrained({', '.join(given)})"

    def load(self, device: torch.device | str) -> nn.Module:
        """Load the model onto a device, in eval mode.

        Raises:
            DownloadError, FileFormatError: See :func:`from_pretrained`.
        """
        arguments = dict(self.arguments)
        # from_pretrained takes these two from the section.
        section = ModelSection(
            name=self.source,
            revision=arguments.pop("revision", None),
            trust_remote_code=bool(arguments.pop("trust_remote_code", False)),
        )
        if self.quantization:
            bits: Any = transformers.BitsAndBytesConfig
            arguments["quantization_config"] = bits(**self.quantization)
            arguments["device_map"] = {"": device}  # A quantized model cannot be moved later.
        load = getattr(transformers, self.auto).from_pretrained
        model = from_pretrained(load, section, what="model", use_safetensors=True, **arguments)
        return move_model(model.eval(), device)


def _label_arguments(section: ModelSection, model: nn.Module) -> dict[str, Any]:
    """Return the arguments that give the base model of a classifier the labels of the run."""
    task, stored = task_settings(model), load_configuration(section)
    arguments: dict[str, Any] = {}
    names = ("id2label", "label2id")
    if any(task[name] != getattr(stored, name) for name in names):
        arguments |= {name: task[name] for name in names}  # These imply the number of labels.
    # A pipeline tells scores, probabilities and those of several labels by the problem type.
    kind, plain = getattr(stored, "problem_type", None), "single_label_classification"
    if task["problem_type"] != kind and (kind or task["problem_type"] not in (plain, None)):
        arguments["problem_type"] = task["problem_type"]
    # Without a padding token, GPT-2 and similar models do not accept a batch of several texts.
    if task["pad_token_id"] != getattr(stored, "pad_token_id", None):
        arguments["pad_token_id"] = task["pad_token_id"]
    kinds = getattr(stored, "architectures", None) or ()
    has_head = any(str(kind).endswith("ForSequenceClassification") for kind in kinds)
    if has_head and stored.num_labels != task["num_labels"]:
        arguments["ignore_mismatched_sizes"] = True
    return arguments
