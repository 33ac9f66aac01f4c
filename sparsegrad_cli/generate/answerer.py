"""Answers by transformers' own ``generate``, many at a time or one as it comes."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, TextStreamer

from sparsegrad_cli.data.conversation import Turn
from sparsegrad_cli.generate.options import GenerationSettings
from sparsegrad_cli.generate.prompting import ChatPrompts
from sparsegrad_cli.numerics.seeding import temporary_seed


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        text: without the end-of-turn token, stripped of white space around it.
        stopped: ``end`` of turn; ``length``, max_new_tokens; or ``full``: no position was left.
        prompt_tokens: what was read.
        tokens: what was generated, the end-of-turn token included.
        seconds: it took; of a batch, an equal share.
        ids: what was generated.
    """

    text: str
    stopped: Literal["end", "length", "full"]
    prompt_tokens: int
    tokens: int
    seconds: float
    ids: tuple[int, ...] = ()


class Answerer:
    """A causal language model that answers conversations.

    What the model's own generation_config.json says of drawing and penalties is set aside: two
    models must be asked in the same way to be compared. Only its end tokens count.

    Args:
        model: of transformers, on its device. Set to eval mode.
        tokenizer: its own.
        settings: how to answer.

    Attributes:
        notes: what the user should know of the chat template.

    Raises:
        UsageError: see :class:`ChatPrompts`.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: GenerationSettings) -> None:
        self._model, self._tokenizer, self._settings = model.eval(), tokenizer, settings
        self._prompts = ChatPrompts(tokenizer)
        self._end = stop_tokens(model, self._prompts)
        text_config = model.config.get_text_config()
        positions = getattr(text_config, "max_position_embeddings", None)
        self._positions = positions if isinstance(positions, int) and positions > 0 else None
        pad = tokenizer.pad_token_id
        # Any token does: attention never looks at padding.
        self._pad = int(pad if pad is not None else (self._end or [0])[0])
        model.generation_config = GenerationConfig(
            eos_token_id=self._end or None, pad_token_id=self._pad
        )

    @property
    def notes(self) -> list[str]:
        """May grow with what is asked."""
        return self._prompts.notes

    @property
    def settings(self) -> GenerationSettings:
        """How it answers."""
        return self._settings

    def answer(self, conversations: Sequence[Sequence[Turn]], name: str = "") -> list[Answer]:
        """Answers to several conversations, generated together.

        Args:
            conversations: turns that end with a user's.
            name: of the batch; with the seed it determines what is drawn.

        Raises:
            DataError: the chat template refuses a conversation.
        """
        prompts = [self._prompts.ids(self._told(turns)) for turns in conversations]
        limits = [self._room(prompt) for prompt in prompts]
        answers: list[Answer | None] = [None] * len(prompts)
        together = [k for k, limit in enumerate(limits) if limit == self._settings.max_new_tokens]
        # Where positions end, a row is cut: alone, so that no other is cut with it.
        alone = [[k] for k in range(len(prompts)) if k not in together]
        for rows in [together, *alone]:
            if not rows:
                continue
            started = time.perf_counter()
            found = [[]] if limits[rows[0]] < 1 else self._run([prompts[k] for k in rows], name)
            seconds = (time.perf_counter() - started) / len(rows)
            for k, ids in zip(rows, found, strict=True):
                answers[k] = self._read(prompts[k], ids, seconds)
        return [answer for answer in answers if answer is not None]

    def stream(self, turns: Sequence[Turn], told: Callable[[str], None], name: str = "") -> Answer:
        """The answer to one conversation; its text is told in parts as they are certain.

        Raises:
            DataError: as :meth:`answer`.
            KeyboardInterrupt: whenever the user presses Ctrl-C; the model can go on afterwards.
        """
        prompt = self._prompts.ids(self._told(turns))
        started = time.perf_counter()
        ids: list[int] = []
        if self._room(prompt) >= 1:
            (ids,) = self._run([prompt], name, _Streamer(self._tokenizer, told))
        return self._read(prompt, ids, time.perf_counter() - started)

    def _told(self, turns: Sequence[Turn]) -> Sequence[Turn]:
        system = self._settings.system
        return turns if system is None else [Turn("system", system), *turns]

    def _room(self, prompt: Sequence[int]) -> int:
        """Tokens that may be generated, below 1 if the prompt itself fills the positions."""
        limit = self._settings.max_new_tokens
        return limit if self._positions is None else min(limit, self._positions - len(prompt))

    @torch.inference_mode()
    def _run(
        self, prompts: Sequence[Sequence[int]], name: str, streamer: Any = None
    ) -> list[list[int]]:
        """Generated ids of each prompt, up to its end-of-turn token; prompts padded on the left."""
        device = next(self._model.parameters()).device
        longest = max(map(len, prompts))
        ids_BL = torch.full((len(prompts), longest), self._pad)
        mask_BL = torch.zeros_like(ids_BL)
        for row, prompt in enumerate(prompts):
            ids_BL[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask_BL[row, longest - len(prompt) :] = 1
        seed = hashlib.sha256(f"{self._settings.seed} {name}".encode()).digest()[:7]
        with temporary_seed(int.from_bytes(seed)):
            out_BL: Tensor = self._model.generate(
                input_ids=ids_BL.to(device),
                attention_mask=mask_BL.to(device),
                generation_config=self._config(min(map(self._room, prompts))),
                streamer=streamer,
            )
        return [self._until_end(row) for row in out_BL[:, longest:].tolist()]

    def _config(self, limit: int) -> GenerationConfig:
        settings = self._settings
        drawing = (
            {"do_sample": False}
            if settings.greedy
            else {
                "do_sample": True,
                "temperature": settings.temperature,
                "top_p": settings.top_p,
                "top_k": 0,  # transformers would cut to 50
            }
        )
        return GenerationConfig(
            max_new_tokens=limit,
            eos_token_id=self._end or None,
            pad_token_id=self._pad,
            **drawing,
        )

    def _until_end(self, row: list[int]) -> list[int]:
        """What a row generated: behind its end-of-turn token there is padding."""
        first = next((k for k, token in enumerate(row) if token in self._end), None)
        return row if first is None else row[: first + 1]

    def _read(self, prompt: Sequence[int], ids: list[int], seconds: float) -> Answer:
        ended = bool(ids) and ids[-1] in self._end
        text = self._tokenizer.decode(ids[:-1] if ended else ids, **_DECODING)
        stopped: Literal["end", "length", "full"] = "end" if ended else "length"
        if not ended and len(ids) < self._settings.max_new_tokens:
            stopped = "full"
        return Answer(text.strip(), stopped, len(prompt), len(ids), seconds, tuple(ids))


_DECODING = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}


class _Streamer(TextStreamer):
    """Tells text instead of printing it, without the white space at its beginning."""

    def __init__(self, tokenizer: Any, told: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, **_DECODING)
        self._told, self._begun = told, False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers with every part."""
        text = text if self._begun else text.lstrip()
        if text:
            self._begun = True
            self._told(text)


def stop_tokens(model: Any, prompts: ChatPrompts) -> list[int]:
    """The tokens that end an answer: of the template, and of the model's generation_config."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    own = () if named is None else (named,) if isinstance(named, int) else map(int, named)
    return sorted({*prompts.end, *own})
