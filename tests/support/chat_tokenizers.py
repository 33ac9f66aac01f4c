"""Conversations and tokenizers for chat tests: real ones, and small trained ones."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any

import pytest

from sparsegrad_cli.data.chat_tokens import ChatEncoder
from sparsegrad_cli.data.conversation import Conversation, Role, Turn
from sparsegrad_cli.errors import UsageError
from support.paths import shared_data

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_CORPUS = (
    "Is 12 more than 7? It is, by 5. And 7? No: they are equal.",
    "user assistant system INST SYS question answer",
    "The children were asleep when the old ship came home, and nobody had seen it.",
)


def chat(*texts: str, system: str | None = None, learn: str = "all") -> Conversation:
    """Return a conversation of alternating turns, after an optional system prompt.

    ``learn`` is ``all`` answers or the ``last`` one.
    """
    turns = [] if system is None else [Turn("system", system)]
    for number, text in enumerate(texts):
        role: Role = "assistant" if number % 2 else "user"
        learnt = role == "assistant" and (learn == "all" or number == len(texts) - 1)
        turns.append(Turn(role, text, learnt))
    return Conversation(tuple(turns), "g")


def labelled_parts(tokenizer: Any, ids: list[int], labels: list[int]) -> list[str]:
    """Return the text of each run of labelled tokens, including the end of turn."""
    parts: list[list[int]] = []
    before = False
    for token, label in zip(ids, labels, strict=True):
        assert label in (-100, token)
        if label != -100:
            if not before:
                parts.append([])
            parts[-1].append(token)
        before = label != -100
    return [tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in parts]


def messages(conversation: Conversation) -> list[dict[str, str]]:
    """Return the conversation as transformers expects it."""
    return [{"role": turn.role, "content": turn.text} for turn in conversation.turns]


@functools.cache
def smollm2_tokenizer() -> Any:
    """Return the tokenizer of builtin:smollm2, or skip. Convert the model on first use."""
    from sparsegrad_cli.models.pretrained import load_tokenizer
    from sparsegrad_cli.recipe.schema import ModelSection

    try:
        return load_tokenizer(ModelSection(name="builtin:smollm2"))
    except UsageError as error:
        pytest.skip(f"{error.what}: {error.fix}")


@functools.cache
def smollm2_encoder() -> ChatEncoder:
    """Return an encoder for builtin:smollm2. Cached, since checking its template takes a second."""
    return ChatEncoder(smollm2_tokenizer())


@functools.cache
def oasst() -> tuple[Conversation, ...]:
    """Return every path of 100 real conversation trees that ends in an answer, or skip."""

    def threads(message: dict[str, Any], path: tuple[Turn, ...]) -> Iterator[Conversation]:
        assistant = message["role"] == "assistant"
        turn = Turn("assistant" if assistant else "user", message["text"], assistant)
        path = (*path, turn)
        if message["replies"]:
            for reply in message["replies"]:
                yield from threads(reply, path)
        elif len(path) > 1:
            yield Conversation(path if assistant else path[:-1], message["message_id"])

    trees = shared_data() / "oasst" / "en_100_trees.jsonl"
    lines = trees.read_text(encoding="utf-8").splitlines()
    return tuple(c for line in lines for c in threads(json.loads(line)["prompt"], ()))


def byte_level(
    template: str | dict[str, str] | None = CHATML, *specials: Any, eos: str = "<|im_end|>"
) -> Any:
    """Return a byte-level BPE tokenizer, as GPT-2, Qwen and SmolLM have."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS, trainer)
    backend.add_special_tokens(list(specials) or ["<|im_start|>", "<|im_end|>"])
    return _fast(backend, template, eos_token=eos)


def sentencepiece(scheme: str, template: str | None = None, *, byte_fallback: bool = True) -> Any:
    """Return a BPE tokenizer that puts a space before the text, as LLaMA-2 and Mistral do.

    Args:
        scheme: ``first`` puts it before the text only, ``legacy`` before every part between
            control tokens, as the first LLaMA tokenizers of transformers did.
        template: chat template.
        byte_fallback: unknown letters become bytes; else the unknown token.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE(byte_fallback=byte_fallback, unk_token="<unk>"))
    if scheme == "legacy":
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))],
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS, trainer)
    # Byte tokens are not special: they stand for letters that the vocabulary lacks.
    content = json.loads(backend.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"][1] != "0"]
    backend = Tokenizer.from_str(json.dumps(content))
    return _fast(backend, template, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _fast(backend: Any, template: str | dict[str, str] | None, **tokens: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=template,
        clean_up_tokenization_spaces=False,
        **tokens,
    )
