"""The sizes of some public models, so that an estimate needs no download.

An estimate needs shapes but no weights. Sizes that are not listed are the defaults of transformers
for that type of model. Tests compare the parameter counts with the published ones.
"""

from __future__ import annotations

from typing import Any

from sparsegrad_cli.errors import DownloadError
from sparsegrad_cli.io.paths import is_folder
from sparsegrad_cli.models import mpnet, smollm2
from sparsegrad_cli.models.pretrained import load_configuration, locate
from sparsegrad_cli.recipe.schema import ModelSection

_ROBERTA = {"type_vocab_size": 1, "max_position_embeddings": 514, "vocab_size": 50265}
_LLAMA = {"vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
_MPNET = {"max_position_embeddings": 514, "layer_norm_eps": 1e-5}

_SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}

# Model name in a recipe -> (model_type of transformers, settings that differ from its defaults).
KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "bert-base-uncased": ("bert", {}),
    "roberta-base": ("roberta", _ROBERTA),
    "roberta-large": (
        "roberta",
        {
            **_ROBERTA,
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
        },
    ),
    mpnet.NAME: ("mpnet", _MPNET),
    "microsoft/mpnet-base": ("mpnet", _MPNET),
    "sentence-transformers/all-mpnet-base-v2": ("mpnet", _MPNET),
    smollm2.NAME: ("llama", _SMOLLM2),
    "HuggingFaceTB/SmolLM2-135M": ("llama", _SMOLLM2),
    "HuggingFaceTB/SmolLM2-135M-Instruct": ("llama", _SMOLLM2),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": (
        "llama",
        {
            **_LLAMA,
            "hidden_size": 2048,
            "num_hidden_layers": 22,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "intermediate_size": 5632,
            "max_position_embeddings": 2048,
        },
    ),
    "meta-llama/Llama-2-7b-hf": (
        "llama",
        {
            **_LLAMA,
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "intermediate_size": 11008,
        },
    ),
    "meta-llama/Llama-2-13b-hf": (
        "llama",
        {
            **_LLAMA,
            "hidden_size": 5120,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
            "intermediate_size": 13824,
        },
    ),
    "meta-llama/Llama-2-70b-hf": (
        "llama",
        {
            **_LLAMA,
            "hidden_size": 8192,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "intermediate_size": 28672,
        },
    ),
    "mistralai/Mistral-7B-v0.1": (
        "mistral",
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 14336,
            "sliding_window": 4096,
        },
    ),
}


def configuration_of(section: ModelSection) -> tuple[Any, str]:
    """Return a model's configuration and a description of its source.

    The table above is used for the exact names in it. Other names are looked up in a local folder,
    the cache or the hub. If all of them fail, the table is searched by the last part of the name.

    Returns:
        The configuration (transformers' PreTrainedConfig) and its source, for the report.

    Raises:
        DownloadError: The configuration cannot be found or downloaded, and is not in the table.
        FileFormatError: A local folder has no readable configuration.
    """
    local = is_folder(section.name)
    if section.name in KNOWN and section.revision is None and not local:
        return _known(section.name), "the built-in table of public sizes"
    try:
        config = load_configuration(section)
    except DownloadError as error:
        same_name = [name for name in KNOWN if _last_part(name) == _last_part(section.name)]
        if not same_name:
            raise DownloadError(
                error.what,
                where=error.where,
                fix="point `model` at a folder with its config.json; without one these are known: "
                + ", ".join(KNOWN),
            ) from error
        source = f"the built-in sizes of {same_name[0]}, because its own are out of reach"
        return _known(same_name[0]), source
    if is_folder(locate(section.name)):
        return config, "its local config.json"
    return config, "its config.json from the hub or its cache"


def _known(name: str) -> Any:
    from transformers import AutoConfig

    model_type, settings = KNOWN[name]
    return AutoConfig.for_model(model_type, **settings)


def _last_part(name: str) -> str:
    return name.rpartition("/")[2]
