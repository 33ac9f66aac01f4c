"""Load the model of a recipe: a classifier, a language model, or one again as it was."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sparsegrad_cli.data.spec import TaskSpec
from sparsegrad_cli.errors import FileFormatError, UsageError
from sparsegrad_cli.modeling.pretrained import from_pretrained, load_configuration
from sparsegrad_cli.modeling.quantized import (
    quantization_config,
    require_bitsandbytes,
    use_frozen_products,
)
from sparsegrad_cli.recipe.schema import ModelSection

_CPU = torch.device("cpu")


def name_labels(config: Any, spec: TaskSpec) -> None:
    """Tell a configuration what a task's classes are, or that it is a regression."""
    names = spec.label_names or ("score",)
    config.num_labels = 1 if spec.regression else len(names)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
    config.problem_type = "regression" if spec.regression else "single_label_classification"


def load_classifier(
    section: ModelSection, spec: TaskSpec, seed: int, device: torch.device = _CPU
) -> nn.Module:
    """A sequence classifier (or regressor) with a freshly initialised head.

    The global random state is seeded with ``seed`` just before the model is built, so that the
    head starts from the same numbers whatever the method.

    Args:
        device: where a quantized model is made, for it cannot be moved; any other is made on the
            CPU.

    Raises:
        UsageError: as :func:`_model`.
        DownloadError, FileFormatError: as :func:`from_pretrained`.
    """
    from transformers import AutoModelForSequenceClassification, set_seed

    config = load_configuration(section)
    name_labels(config, spec)
    set_seed(seed)
    return _with_body(section, *_model(AutoModelForSequenceClassification, section, config, device))


def load_causal_lm(
    section: ModelSection, device: torch.device = _CPU, *, packed: bool = False
) -> nn.Module:
    """A causal language model as it was trained: no head is added, nothing is drawn at random.

    Args:
        device: as in :func:`load_classifier`.
        packed: weights may lie quantized on disk: who only asks a model needs no others.

    Raises:
        UsageError: an encoder-decoder, which has no place for a conversation's one sequence; or as
            :func:`_model`.
        DownloadError, FileFormatError: as :func:`from_pretrained`; also where weights are missing,
            such as the head of a model that was saved without it.
    """
    from transformers import AutoModelForCausalLM

    config = load_configuration(section)
    if getattr(config, "is_encoder_decoder", False):
        raise UsageError(
            f"{section.name} is an encoder-decoder ({config.model_type}), no causal language model",
            where="model.name",
            fix="a chat task needs a decoder such as LLaMA, Mistral, Qwen, SmolLM or GPT-2",
        )
    kind: Any = AutoModelForCausalLM
    model, lacking = _model(kind, section, config, device, packed=packed)
    if lacking:
        raise FileFormatError(
            f"{section.name} is no whole causal language model: it lacks {_some(lacking)}",
            where="model.name",
            fix="is it an encoder, or a decoder saved without its language-model head?",
        )
    return model


def load_again(section: ModelSection, like: nn.Module, seed: int) -> nn.Module:
    """The plain model of the class and configuration of ``like``, anew from its files.

    What the files do not hold (a task head) is drawn with ``seed``.

    Raises:
        DownloadError, FileFormatError: as :func:`from_pretrained`.
    """
    from transformers import set_seed

    set_seed(seed)
    config: Any = copy.deepcopy(like.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # what transformers wrote there when it quantized ``like``
    return _with_body(section, *_model(type(like), section, config))


def load_as(
    auto: str,
    section: ModelSection,
    settings: Mapping[str, Any],
    device: torch.device = _CPU,
) -> nn.Module:
    """A model by the name of an Auto class of transformers, with changes to its configuration.

    Args:
        device: as in :func:`load_classifier`.

    Raises:
        UsageError: as :func:`_model`.
        DownloadError, FileFormatError: as :func:`from_pretrained`.
    """
    import transformers

    config = load_configuration(section)
    for name, value in settings.items():
        setattr(config, name, value)
    kind = getattr(transformers, auto)
    return _with_body(section, *_model(kind, section, config, device))


def _with_body(section: ModelSection, model: nn.Module, lacking: list[str]) -> nn.Module:
    """The model, of which only a head or pooler is made anew.

    Raises:
        FileFormatError: weights of its body are missing, or have another shape.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    body = [k for k in lacking if k.startswith(prefix) and "pooler" not in k.split(".")]
    if body:
        raise FileFormatError(
            f"{section.name} does not hold the model that its config.json describes: it lacks "
            f"{_some(body)}, or holds them in another shape",
            where="model.name",
            fix="bring the files back from where they came from",
        )
    return model


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _model(
    kind: Any,
    section: ModelSection,
    config: Any,
    device: torch.device = _CPU,
    *,
    packed: bool = False,
) -> tuple[nn.Module, list[str]]:
    """``kind.from_pretrained``, quantized where the section says so.

    Returns:
        The model, and the names of what its files lack or hold in another shape: transformers has
        filled that with random numbers.

    Raises:
        UsageError: the folder holds quantized weights, or bitsandbytes is missing.
        DownloadError, FileFormatError: as :func:`from_pretrained`.
    """
    stored = getattr(config, "quantization_config", None) is not None
    if stored and (section.quantization is not None or not packed):
        raise UsageError(
            f"{section.name} holds weights that are quantized already",
            where="model.name",
            fix="name the model that it was made from, with model.quantization: 4bit or 8bit",
        )
    dtype = getattr(torch, section.dtype)
    # Weights of other shapes: a head's are made anew, others are refused by name.
    more: dict[str, Any] = {"dtype": dtype, "ignore_mismatched_sizes": True}
    more |= {"use_safetensors": True, "output_loading_info": True}
    if section.quantization is not None:
        require_bitsandbytes()
        settings = quantization_config(
            section.quantization, dtype, _weightless(kind, config, section)
        )
        more["quantization_config"] = settings
    if stored or section.quantization is not None:
        more["device_map"] = {"": device}
    model, report = from_pretrained(
        kind.from_pretrained, section, what="model", config=config, **more
    )
    use_frozen_products(model, dtype)
    return model, sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})


def _weightless(kind: Any, config: Any, section: ModelSection) -> nn.Module:
    """The model on the meta device; the global random state is left alone."""
    config = copy.deepcopy(config)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        plain: nn.Module
        if hasattr(kind, "from_config"):
            plain = kind.from_config(config, trust_remote_code=section.trust_remote_code)
        else:
            plain = kind(config)
    return plain
