"""The plain model: the class and the keys that transformers knows, with nothing of ours in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparsegrad_cli.errors import SparsegradError
from sparsegrad_cli.export.rebuild import Trained
from sparsegrad_cli.generate.answerer import stop_tokens
from sparsegrad_cli.generate.prompting import ChatPrompts
from sparsegrad_cli.models.load_model import load_again
from sparsegrad_cli.models.quantized import dequantized, quantized_layers
from sparsegrad_cli.models.targets import Target

# Auto classes that an export can be loaded by, with peft's name for the task.
AUTO_CLASSES = {
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForCausalLM": "CAUSAL_LM",
}
_SHARD = "5GB"


def auto_class(model: nn.Module) -> str:
    """The Auto class of transformers that makes models of this class.

    Raises:
        SparsegradError: there is none that an export knows.
    """
    import transformers

    config: Any = model.config
    declared = getattr(config, "auto_map", None) or {}  # of models that bring their own code
    for name in AUTO_CLASSES:
        known = getattr(transformers, name)._model_mapping.get(type(config), ())
        classes = known if isinstance(known, tuple | list) else (known,)
        if type(model) in classes or str(declared.get(name, "")).endswith(type(model).__name__):
            return name
    raise SparsegradError(
        f"{type(model).__name__} is neither a sequence classifier nor a causal language model: "
        "there is no plain form to export it to"
    )


def plain_model(trained: Trained) -> nn.Module:
    """The base model anew, on the same device, in eval mode.

    What its files do not hold is drawn with another seed than the run's: whatever an export forgets
    to carry then differs. Of a quantized run every quantized layer becomes a plain one that holds
    what its weight stood for: that is what the run was trained beside.
    """
    setup, recipe = trained.setup, trained.recipe
    section = recipe.model.model_copy(update={"quantization": None})
    plain = load_again(section, setup.model, recipe.seed + 1).to(setup.device).eval()
    with torch.no_grad():
        for name, layer in quantized_layers(setup.model).items():
            weight = plain.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            weight_OI = weight.T if isinstance(plain.get_submodule(name), Conv1D) else weight
            weight_OI.copy_(dequantized(layer))
    return plain


def differing(plain: nn.Module, trained: Trained) -> dict[str, Tensor]:
    """What the run's model holds otherwise than its base, by plain name; not the targets' weights.

    What was not trained is there because the base model's files do not hold it. Parameters that are
    tied are listed by each of their names.
    """
    weights = {f"{target.name}.weight" for target in trained.setup.targets}
    # A quantized weight is what the plain model was given.
    weights |= {f"{name}.weight" for name in quantized_layers(trained.setup.model)}
    found: dict[str, Tensor] = {}
    for name, parameter in plain.named_parameters(remove_duplicate=False):
        if name in weights:
            continue
        path, _, last = name.rpartition(".")
        # By attribute, not by name: peft's layers keep the plain one's bias a level deeper.
        there = getattr(trained.setup.model.get_submodule(path), last)
        # What trains among half-precision weights is float32: the value counts, not the dtype.
        if not torch.equal(there.float(), parameter.float()):
            found[name] = there
    return found


def put(plain: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy tensors into the plain model's parameters of those names."""
    with torch.no_grad():
        for name, tensor in tensors.items():
            plain.get_parameter(name).copy_(tensor)


@dataclass
class Distance:
    """Sums of squares over targets: how far one set of matrices is from another.

    Attributes:
        error: of the difference to what should be.
        change: of what training changed, to read the error against.
    """

    error: float = 0.0
    change: float = 0.0

    def add(self, error_OI: Tensor, change_OI: Tensor) -> float:
        """Add a target's; returns its own ||error|| / ||change|| (Frobenius), 0 if neither is."""
        error, change = float(error_OI.square().sum()), float(change_OI.square().sum())
        self.error += error
        self.change += change
        return _ratio(error, change)

    @property
    def relative(self) -> float:
        """||error|| / ||change|| over all targets."""
        return _ratio(self.error, self.change)


def _ratio(error: float, change: float) -> float:
    if error == 0:
        return 0.0
    return (error / change) ** 0.5 if change else float("inf")


def put_weight(plain: nn.Module, target: Target, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Round a float64 weight into the plain model's layer.

    Returns:
        (rounding error, change of the layer's weight), both (out, in) in float64.
    """
    # A view of the parameter, whichever way it lies.
    held_OI = target.within(plain).weight_OI(plain).detach()
    change_OI = weight_OI - held_OI.double()
    with torch.no_grad():
        held_OI.copy_(weight_OI)
    return held_OI.double() - weight_OI, change_OI


def merge(trained: Trained) -> tuple[nn.Module, dict[str, Any]]:
    """The plain model that computes what the run's does, and what rounding its weights brought."""
    plain = plain_model(trained)
    put(plain, differing(plain, trained))
    whole, rows = Distance(), []
    for target in trained.setup.targets:
        weight_OI = trained.method.merged_OI(trained.setup.model, target)
        rounding_OI, change_OI = put_weight(plain, target, weight_OI)
        relative = whole.add(rounding_OI, change_OI)
        largest = float(rounding_OI.abs().max())
        rows.append({"name": target.name, "rounding": relative, "rounding_max": largest})
    dtype = str(next(plain.parameters()).dtype).removeprefix("torch.")
    quantized = quantized_layers(trained.setup.model)
    return plain, {
        "dtype": dtype,
        "rounding": whole.relative,
        "dequantized": len(quantized) if quantized else None,
        "targets": rows,
    }


def with_stop_tokens(plain: Any, tokenizer: Any) -> Any:
    """The model's generation settings, with the end-of-turn token of the chat template.

    A model that was trained on turns ends them with it, whatever its base model ended texts with.
    """
    from transformers import GenerationConfig

    stops = stop_tokens(plain, ChatPrompts(tokenizer))
    # Anew, for settings that transformers made from the model's are made again where it loads them.
    said = plain.generation_config.to_dict()
    own = {key: value for key, value in said.items() if not key.startswith("_")}
    stop: Any = stops if len(stops) != 1 else stops[0]
    return GenerationConfig.from_dict({**own, "eos_token_id": stop or None})


def write_plain(plain: Any, trained: Trained, folder: Path) -> None:
    """A Hugging Face folder: sharded safetensors, configuration, tokenizer, chat template."""
    if auto_class(plain) == "AutoModelForCausalLM":
        plain.generation_config = with_stop_tokens(plain, trained.setup.tokenizer)
    plain.save_pretrained(folder, max_shard_size=_SHARD)
    trained.setup.tokenizer.save_pretrained(folder)


def load_plain(auto: str, folder: Path, *, trust_remote_code: bool) -> nn.Module:
    """Load a written folder as anyone would, and see that every key found its place.

    Raises:
        SparsegradError: a parameter is missing, or there is one that the model has no place for.
    """
    import transformers

    model, info = getattr(transformers, auto).from_pretrained(
        folder, output_loading_info=True, trust_remote_code=trust_remote_code
    )
    wrong = {what: sorted(map(str, keys)) for what, keys in info.items() if keys}
    if wrong:
        what, keys = next(iter(wrong.items()))
        raise SparsegradError(f"the written folder does not fit its model: {what}: {keys[0]}")
    loaded: nn.Module = model
    return loaded


def task_settings(model: nn.Module) -> dict[str, Any]:
    """What the task added to the base model's configuration: labels, and a padding token."""
    config: Any = model.config
    return {
        "num_labels": len(config.id2label),
        "id2label": dict(config.id2label),
        "label2id": dict(config.label2id),
        "problem_type": getattr(config, "problem_type", None),
        "pad_token_id": getattr(config, "pad_token_id", None),
    }
