"""Tiny random chat models saved in folders, and the tokenizer of builtin:smollm2."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsegrad_cli.data.conversation import Turn
from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.generate.load_chat_model import load_chat_model
from sparsegrad_cli.generate.options import ModelOptions
from sparsegrad_cli.models.pretrained import load_tokenizer
from sparsegrad_cli.recipe.schema import ModelSection
from support.tiny_models import build, config

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


PLAIN = (
    "{% for m in messages %}{{ m.role }}:\n{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)


@functools.cache
def smollm2_tokenizer() -> Any:
    """Return the tokenizer of builtin:smollm2, or skip if its package is not installed."""
    try:
        return load_tokenizer(ModelSection(name="builtin:smollm2"))
    except UsageError as error:
        pytest.skip(f"{error.what}: {error.fix}")


def chat_turns(*texts: str) -> list[Turn]:
    """Return turns that alternate between user and assistant."""
    return [Turn("assistant" if number % 2 else "user", text) for number, text in enumerate(texts)]


def byte_tokenizer(template: str | None = CHATML, *, endless: bool = False) -> Any:
    """Return a tokenizer with one token per byte and four special tokens.

    With ``endless``, it has no end-of-text token.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate([*specials, *letters])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=template,
        bos_token="<s>",
        eos_token=None if endless else "</s>",
        clean_up_tokenization_spaces=False,
    )


def chat_model_folder(
    folder: Path,
    *,
    positions: int = 512,
    dtype: torch.dtype = torch.float32,
    template: str | None = CHATML,
    seed: int = 3,
    endless: bool = False,
    **shape: int,
) -> Path:
    """Save a tiny random LLaMA that generates bytes; with ``endless`` it never stops."""
    from transformers import AutoModelForCausalLM

    settings = config(
        "llama",
        vocab_size=260,
        initializer_range=0.3,
        max_position_embeddings=positions,
        **shape,
    )
    if endless:
        settings.eos_token_id = None
        template = PLAIN
    model: Any = build(AutoModelForCausalLM, settings, seed).to(dtype)
    model.save_pretrained(folder)
    byte_tokenizer(template, endless=endless).save_pretrained(folder)
    return folder


def load(source: Path | str, **options: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Load a model as the command does, on the CPU."""
    return load_chat_model(ModelOptions(str(source), device="cpu", **options))
