"""Answer conversations with a causal language model, in batches or as a stream."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, TextStreamer

from sparsegrad_cli.data.chat_template import ChatTemplate
from sparsegrad_cli.data.conversation import Conversation, Turn
from sparsegrad_cli.data.template_tokenizer import TemplateTokenizer
from sparsegrad_cli.errors import DataError
from sparsegrad_cli.numerics.seeding import temporary_seed
from sparsegrad_cli.tasks.generation_settings import GenerationSettings

_QUESTION = (Turn("user", "Is 12 more than 7?"),)
_CONVERSATION = (*_QUESTION, Turn("assistant", "It is, by 5."), Turn("user", "And 7?"))
_DECODING = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        text: The answer without the end-of-turn token and surrounding white space.
        stopped: Why generation ended: ``end`` at an end-of-turn token, ``length`` at
            max_new_tokens, ``full`` at the model's last position.
        prompt_tokens: Number of tokens of the prompt.
        tokens: Number of generated tokens, with the end-of-turn token.
        seconds: Time to generate it; in a batch, an equal share.
        ids: The generated token ids.
    """

    text: str
    stopped: Literal["end", "length", "full"]
    prompt_tokens: int
    tokens: int
    seconds: float
    ids: tuple[int, ...] = ()


class ChatPrompts:
    """Encode conversations as prompts, with the chat template of a tokenizer.

    Control tokens in the user's text are encoded as text, as in training.

    Args:
        tokenizer: A tokenizer of transformers; it is not changed.

    Attributes:
        end: Ids of the tokens that end an assistant's turn.

    Raises:
        UsageError: See :class:`ChatTemplate` and :class:`TemplateTokenizer`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._pieces = TemplateTokenizer(tokenizer)
        self._template = ChatTemplate(tokenizer, self._pieces.control)
        self._pieces.fit(self._template.prompt(_CONVERSATION))
        own = tokenizer.eos_token_id
        self.end = self._ends_of_turn() | ({own} if own is not None else set())

    @property
    def notes(self) -> list[str]:
        """Notes for the user about the template so far."""
        return self._template.notes

    def ids(self, turns: Sequence[Turn]) -> list[int]:
        """Return the token ids of the turns and of the beginning of the assistant's answer.

        Raises:
            DataError: The template rejects the turns.
        """
        chat = self._template.prompt(turns)
        return [i for piece in self._pieces.encode(chat) for i in piece.ids]

    def _ends_of_turn(self) -> set[int]:
        """Return the control token that the template puts after an answer, if there is one."""
        answer = Turn("assistant", "It is, by 5.", learn=True)
        try:
            chat = self._template.render(Conversation((*_QUESTION, answer), "test"))
        except DataError:
            return set()  # Its answers differ from its prompts, so only the EOS token is known.
        ((start, end),) = chat.learnt
        last = [p for p in self._pieces.encode(chat) if p.control and start <= p.start < end]
        return set(last[-1].ids) if last else set()


class Answerer:
    """A causal language model that answers conversations.

    The sampling settings in the model's generation_config.json are ignored, since models can only
    be compared if they answer with the same settings. Only its end tokens are used.

    Args:
        model: A model of transformers on its device; set to eval mode.
        tokenizer: Its tokenizer.
        settings: How to answer.

    Raises:
        UsageError: See :class:`ChatPrompts`.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: GenerationSettings) -> None:
        self._model, self._tokenizer, self._settings = model.eval(), tokenizer, settings
        self._prompts = ChatPrompts(tokenizer)
        self._end = stop_tokens(model, self._prompts)
        text_config = model.config.get_text_config()
        positions = getattr(text_config, "max_position_embeddings", None)
        self._positions = positions if isinstance(positions, int) and positions > 0 else None
        pad = tokenizer.pad_token_id
        # Any token works, because padding is masked.
        self._pad = int(pad if pad is not None else (self._end or [0])[0])

    @property
    def notes(self) -> list[str]:
        """Notes for the user about the chat template so far."""
        return self._prompts.notes

    @property
    def settings(self) -> GenerationSettings:
        """The generation settings."""
        return self._settings

    def answer(self, conversations: Sequence[Sequence[Turn]], name: str = "") -> list[Answer]:
        """Answer several conversations in one batch.

        Args:
            conversations: Turns that end with the user's.
            name: A name of the batch, which seeds the sampling together with the seed.

        Raises:
            DataError: The chat template refuses a conversation.
        """
        prompts = [self._prompts.ids(self._with_system(turns)) for turns in conversations]
        limits = [self._limit(prompt) for prompt in prompts]
        answers: list[Answer | None] = [None] * len(prompts)
        together = [k for k, limit in enumerate(limits) if limit == self._settings.max_new_tokens]
        # A long prompt leaves room for fewer tokens. Alone, it does not limit the others.
        alone = [[k] for k in range(len(prompts)) if k not in together]
        for rows in [together, *alone]:
            if not rows:
                continue
            started = time.perf_counter()
            found = [[]] if limits[rows[0]] < 1 else self._run([prompts[k] for k in rows], name)
            seconds = (time.perf_counter() - started) / len(rows)
            for k, ids in zip(rows, found, strict=True):
                answers[k] = self._decode(prompts[k], ids, seconds)
        return [answer for answer in answers if answer is not None]

    def stream(self, turns: Sequence[Turn], told: Callable[[str], None], name: str = "") -> Answer:
        """Answer one conversation; pass parts of the text to ``told`` as they are generated.

        Raises:
            DataError: See :meth:`answer`.
            KeyboardInterrupt: The user has pressed Ctrl-C; the model stays usable.
        """
        prompt = self._prompts.ids(self._with_system(turns))
        started = time.perf_counter()
        ids: list[int] = []
        if self._limit(prompt) >= 1:
            (ids,) = self._run([prompt], name, _Streamer(self._tokenizer, told))
        return self._decode(prompt, ids, time.perf_counter() - started)

    def _with_system(self, turns: Sequence[Turn]) -> Sequence[Turn]:
        system = self._settings.system
        return turns if system is None else [Turn("system", system), *turns]

    def _limit(self, prompt: Sequence[int]) -> int:
        """Return how many tokens can be generated; below 1 if the prompt fills all positions."""
        limit = self._settings.max_new_tokens
        return limit if self._positions is None else min(limit, self._positions - len(prompt))

    @torch.no_grad()  # Not inference_mode: a model in training may keep what it computes here.
    def _run(
        self, prompts: Sequence[Sequence[int]], name: str, streamer: Any = None
    ) -> list[list[int]]:
        """Generate for every prompt, padded on the left, up to its end-of-turn token."""
        device = next(self._model.parameters()).device
        longest = max(map(len, prompts))
        ids_BL = torch.full((len(prompts), longest), self._pad)
        mask_BL = torch.zeros_like(ids_BL)
        for row, prompt in enumerate(prompts):
            ids_BL[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask_BL[row, longest - len(prompt) :] = 1
        seed = hashlib.sha256(f"{self._settings.seed} {name}".encode()).digest()[:7]
        with temporary_seed(int.from_bytes(seed)), self._own_generation_config():
            out_BL: Tensor = self._model.generate(
                input_ids=ids_BL.to(device),
                attention_mask=mask_BL.to(device),
                generation_config=self._config(min(map(self._limit, prompts))),
                streamer=streamer,
            )
        return [self._until_end(row) for row in out_BL[:, longest:].tolist()]

    @contextmanager
    def _own_generation_config(self) -> Iterator[None]:
        """Replace the model's settings, which would fill in those that are not given."""
        before = self._model.generation_config
        self._model.generation_config = GenerationConfig(
            eos_token_id=self._end or None, pad_token_id=self._pad
        )
        try:
            yield
        finally:
            self._model.generation_config = before

    def _config(self, limit: int) -> GenerationConfig:
        settings = self._settings
        sampling: dict[str, Any] = {"do_sample": False}
        if not settings.greedy:
            sampling = {
                "do_sample": True,
                "temperature": settings.temperature,
                "top_p": settings.top_p,
                "top_k": 0,  # The default of transformers is 50.
            }
        return GenerationConfig(
            max_new_tokens=limit,
            eos_token_id=self._end or None,
            pad_token_id=self._pad,
            **sampling,
        )

    def _until_end(self, row: list[int]) -> list[int]:
        """Cut off the padding after the end-of-turn token."""
        first = next((k for k, token in enumerate(row) if token in self._end), None)
        return row if first is None else row[: first + 1]

    def _decode(self, prompt: Sequence[int], ids: list[int], seconds: float) -> Answer:
        ended = bool(ids) and ids[-1] in self._end
        text = self._tokenizer.decode(ids[:-1] if ended else ids, **_DECODING)
        stopped: Literal["end", "length", "full"] = "end" if ended else "length"
        if not ended and len(ids) < self._settings.max_new_tokens:
            stopped = "full"
        return Answer(text.strip(), stopped, len(prompt), len(ids), seconds, tuple(ids))


class _Streamer(TextStreamer):
    """Pass text to a function instead of printing it, without leading white space."""

    def __init__(self, tokenizer: Any, told: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, **_DECODING)
        self._told, self._begun = told, False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Receive a part of the text from transformers."""
        text = text if self._begun else text.lstrip()
        if text:
            self._begun = True
            self._told(text)


def stop_tokens(model: Any, prompts: ChatPrompts) -> list[int]:
    """Return the tokens that end an answer: the template's and those in generation_config."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    own = () if named is None else (named,) if isinstance(named, int) else map(int, named)
    return sorted({*prompts.end, *own})
