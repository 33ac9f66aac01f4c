"""Tiny configurations of many architectures and the target modules expected in each."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from support.tiny_models import build

H, W, E = 32, 72, 24  # hidden, intermediate and expert width
VOCABULARY, BLOCKS = 64, 2

_ENCODER: dict[str, Any] = {
    "hidden_size": H,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "intermediate_size": W,
    "max_position_embeddings": 64,
}
# Heads wider than hidden / heads: q_proj and o_proj have the shapes of a pair.
_DECODER = {**_ENCODER, "num_key_value_heads": 2, "head_dim": 12}
_GPT = {"n_embd": H, "n_layer": BLOCKS, "n_head": 4, "n_inner": W, "n_positions": 64}
_MOE = {**_DECODER, "moe_intermediate_size": E, "num_experts": 4, "num_experts_per_tok": 2}
_DEEPSEEK = {
    **_ENCODER,
    "num_key_value_heads": 4,
    "moe_intermediate_size": E,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 12,
    "n_shared_experts": 1,
}
_XLNET = {"d_model": H, "n_layer": BLOCKS, "n_head": 4, "d_inner": W}

Targets = dict[str, tuple[int, int, int]]  # kind -> (how many, out, in)


def _pair(up: str, down: str, *, out: int = W, inner: int = W, count: int = BLOCKS) -> Targets:
    return {up: (count, out, H), down: (count, H, inner)}


def _gated(path: str = "mlp", *, inner: int = W, count: int = BLOCKS) -> Targets:
    up = (count, inner, H)
    return {
        f"{path}.gate_proj": up,
        f"{path}.up_proj": up,
        f"{path}.down_proj": (count, H, inner),
    }


_BERT = _pair("intermediate.dense", "output.dense")
_FUSED = _pair("mlp.gate_up_proj", "mlp.down_proj", out=2 * W)
_H_TO_4H = _pair("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
_EXPERTS = {"mlp.experts.gate_up_proj": (4, 2 * E, H), "mlp.experts.down_proj": (4, H, E)}

# architecture -> (model_type, configuration, targets, expert parameters, which are not targets)
TABLE: dict[str, tuple[str, dict[str, Any], Targets, Targets]] = {
    "bert": ("bert", _ENCODER, _BERT, {}),
    "roberta": ("roberta", _ENCODER, _BERT, {}),
    "electra": ("electra", {**_ENCODER, "embedding_size": 16}, _BERT, {}),
    "deberta-v2": ("deberta-v2", _ENCODER, _BERT, {}),
    "mpnet": ("mpnet", _ENCODER, _BERT, {}),
    "distilbert": (
        "distilbert",
        {"dim": H, "n_layers": BLOCKS, "n_heads": 4, "hidden_dim": W},
        _pair("ffn.lin1", "ffn.lin2"),
        {},
    ),
    "albert": (
        "albert",
        {**_ENCODER, "embedding_size": 16},
        _pair("albert_layers.0.ffn", "albert_layers.0.ffn_output", count=1),
        {},
    ),
    "modernbert": ("modernbert", _ENCODER, _pair("mlp.Wi", "mlp.Wo", out=2 * W), {}),
    "xlnet": ("xlnet", _XLNET, _pair("ff.layer_1", "ff.layer_2"), {}),
    "gpt2": ("gpt2", _GPT, _pair("mlp.c_fc", "mlp.c_proj"), {}),
    "gpt_neo": (
        "gpt_neo",
        {
            "hidden_size": H,
            "num_layers": BLOCKS,
            "num_heads": 4,
            "intermediate_size": W,
            "attention_types": [[["global", "local"], 1]],
        },
        _pair("mlp.c_fc", "mlp.c_proj"),
        {},
    ),
    "gpt_neox": ("gpt_neox", _ENCODER, _H_TO_4H, {}),
    "opt": (
        "opt",
        {**_ENCODER, "ffn_dim": W, "word_embed_proj_dim": H},
        _pair("fc1", "fc2"),
        {},
    ),
    "bloom": (
        "bloom",
        {"hidden_size": H, "n_layer": BLOCKS, "n_head": 4},
        _pair("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", out=4 * H, inner=4 * H),
        {},
    ),
    "falcon": ("falcon", {**_ENCODER, "ffn_hidden_size": W}, _H_TO_4H, {}),
    "phi": ("phi", _ENCODER, _pair("mlp.fc1", "mlp.fc2"), {}),
    "phi3": ("phi3", {**_DECODER, "bos_token_id": 1, "eos_token_id": 2}, _FUSED, {}),
    "glm4": ("glm4", _DECODER, _FUSED, {}),
    "gemma2": ("gemma2", _DECODER, _gated(), {}),
    "gemma3": ("gemma3_text", _DECODER, _gated(), {}),
    "qwen2": ("qwen2", _DECODER, _gated(), {}),
    "qwen3": ("qwen3", _DECODER, _gated(), {}),
    "mistral": ("mistral", _DECODER, _gated(), {}),
    "llama": ("llama", _DECODER, _gated(), {}),
    "olmo": ("olmo", _DECODER, _gated(), {}),
    "starcoder2": ("starcoder2", _DECODER, _pair("mlp.c_fc", "mlp.c_proj"), {}),
    "qwen2_moe": (
        "qwen2_moe",
        {**_MOE, "shared_expert_intermediate_size": 40},
        _gated("mlp.shared_expert", inner=40),
        _EXPERTS,
    ),
    "qwen3_moe": ("qwen3_moe", {**_MOE, "mlp_only_layers": [0]}, _gated(count=1), _EXPERTS),
    "deepseek_v3": (
        "deepseek_v3",
        _DEEPSEEK,
        _gated(count=1) | _gated("mlp.shared_experts", inner=E, count=1),
        _EXPERTS,
    ),
}
# Models whose MLPs are all experts, or that have no MLP.
WITHOUT_MLP: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {**_DECODER, "num_local_experts": 4}),
    "qwen3_moe": ("qwen3_moe", _MOE),
    "mamba": ("mamba", {"hidden_size": H, "num_hidden_layers": BLOCKS}),
}


def causal_or_body(model_type: str, settings: dict[str, Any], seed: int = 0) -> nn.Module:
    """Return a random causal language model, or the bare encoder if the type has no such model."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    words = {"vocab_size": VOCABULARY, "pad_token_id": 0, **settings}
    config = AutoConfig.for_model(model_type, **words)
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    return build(AutoModelForCausalLM if causal else AutoModel, config, seed)


def tokens(size: int = 4, length: int = 6, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return a batch of token ids that are also the labels."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (size, length), generator=draw)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
