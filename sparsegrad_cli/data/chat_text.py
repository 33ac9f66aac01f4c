"""A conversation as its chat template writes it, and where in that text the assistant speaks.

A template is a program: it may add a system prompt, strip texts, refuse roles, or write an earlier
turn otherwise once later ones follow. So nothing is looked for in what it wrote. An assistant's
turn is what the text of the turns up to it has more than the prompt that asks for it, and both must
be beginnings of the whole text; or it is what ``{% generation %}`` marks in the template.

Control tokens that somebody typed (``<|im_end|>`` in a question) are masked before the template
sees them, by as many private-use characters: what reads as a control token afterwards was written
by the template.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from sparsegrad_cli.data.conversation import Conversation, Turn
from sparsegrad_cli.errors import DataError, UsageError

# Touvron et al. 2023 (LLaMA 2), appendix A.3.3 and its released code: every pair of turns opens
# with BOS and closes with EOS, the system prompt stands in the first question.
LLAMA2 = """\
{%- set first = 1 if messages and messages[0].role == 'system' else 0 -%}
{%- for message in messages[first:] -%}
  {%- if message.role != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
    {{- raise_exception('user and assistant must take turns, after at most one system prompt') -}}
  {%- elif message.role == 'assistant' -%}
    {{- ' ' + message.content.strip() + eos_token -}}
  {%- else -%}
    {{- bos_token | default('') + '[INST] ' -}}
    {%- if first and loop.first -%}
      {{- '<<SYS>>\\n' + messages[0].content.strip() + '\\n<</SYS>>\\n\\n' -}}
    {%- endif -%}
    {{- message.content.strip() + ' [/INST]' -}}
  {%- endif -%}
{%- endfor -%}"""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PRIVATE = range(0x100000, 0x10FFFE)  # supplementary private use area B


@dataclass(frozen=True)
class ChatText:
    """What the template wrote.

    Attributes:
        text: with control tokens of the turns masked.
        learnt: (start, end) in characters of each learnt turn, in order, end of turn included.
        masks: private-use character -> the control token it stands for, repeated to its length.
    """

    text: str
    learnt: list[tuple[int, int]]
    masks: Mapping[str, str]

    def unmasked(self, start: int, end: int) -> str:
        """The text from start to end, with what was typed."""
        part = self.text[start:end]
        for character, token in self.masks.items():
            part = part.replace(character * len(token), token)
        return part


class ChatTemplate:
    """The chat template of a tokenizer, or LLaMA-2's form where it has none.

    Args:
        tokenizer: of transformers.
        control: its control tokens, as text.

    Attributes:
        notes: what the user should know about the template.

    Raises:
        UsageError: no template, and no end token that LLaMA-2's form needs.
    """

    def __init__(self, tokenizer: Any, control: Iterable[str]) -> None:
        self.notes: list[str] = []
        self._variables = dict(tokenizer.special_tokens_map)
        if tokenizer.chat_template is None:
            if tokenizer.eos_token is None:
                raise UsageError(
                    "the tokenizer has neither a chat template nor an end token",
                    where="model.name",
                    fix="set chat_template or eos_token in its tokenizer_config.json",
                )
            self._source = LLAMA2
            self.notes.append(
                "the tokenizer has no chat template: LLaMA-2's form is used, [INST] ... [/INST]"
            )
        else:
            self._source = tokenizer.get_chat_template()
        self._marked = _GENERATION.search(self._source) is not None
        longest_first = sorted(control, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._takes_system: bool | None = None

    def render(self, conversation: Conversation) -> ChatText:
        """What the template makes of a conversation.

        Raises:
            DataError: the template refuses it, or does not let the learnt turns be told.
        """
        turns, masks = self._mask(self._with_system_where_it_goes(conversation))
        where = f"conversation {conversation.group}"
        text, spans = self._write(turns, where=where, marks=self._marked)
        assistants = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
        if not self._marked:
            learnt = [self._turn(turns, i, text, where) for i in assistants if turns[i].learn]
        elif len(spans) == len(assistants):
            learnt = [span for span, i in zip(spans, assistants, strict=True) if turns[i].learn]
        else:
            raise DataError(
                f"the chat template marks {len(spans)} parts as generated in a conversation with "
                f"{len(assistants)} turns of the assistant",
                where=where,
                fix="mend {% generation %} in the tokenizer's chat_template",
            )
        return ChatText(text, learnt, masks)

    def prompt(self, turns: Sequence[Turn]) -> ChatText:
        """What the template writes to ask for an answer to the turns; nothing in it is learnt.

        Raises:
            DataError: the template refuses them.
        """
        asked = Conversation(tuple(turns), "to be answered")
        masked, masks = self._mask(self._with_system_where_it_goes(asked))
        text, _ = self._write(masked, where="the conversation", prompt=True)
        return ChatText(text, [], masks)

    def _turn(self, turns: Sequence[Turn], i: int, text: str, where: str) -> tuple[int, int]:
        """Where turn i stands in the text, from the texts of the turns before and up to it."""
        if i == 0:
            raise DataError(
                "the assistant speaks first and is to be learnt: nothing asks for that turn",
                where=where,
                fix="put a system or user turn before it",
            )
        before, _ = self._write(turns[:i], where=where, prompt=True)
        after, _ = self._write(turns[: i + 1], where=where)
        if after.startswith(before) and text.startswith(after):
            return len(before), len(after)
        if not after.startswith(before):
            what = "the chat template prompts for an assistant's turn otherwise than it writes one"
            fix = "mark what is generated by {% generation %} in the tokenizer's chat_template"
        else:
            what = (
                f"the chat template writes turn {i + 1} otherwise once others follow: its tokens "
                "cannot be told"
            )
            fix = "learn the last turn only, or mark what is generated by {% generation %}"
        raise DataError(what, where=where, fix=fix)

    def _write(
        self, turns: Sequence[Turn], *, where: str, prompt: bool = False, marks: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """The template's text, and the spans it marks as generated."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        try:
            texts, spans = render_jinja_template(
                [messages],
                chat_template=self._source,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=prompt,
                **self._variables,
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise DataError(
                f"the chat template refuses the conversation: {error}",
                where=where,
                fix="most templates want one system turn at most, then user and assistant in turn",
            ) from error
        return texts[0], [(start, end) for start, end in spans[0]] if marks else []

    def _with_system_where_it_goes(self, conversation: Conversation) -> list[Turn]:
        """The turns, the system's put before the first question if the template takes none."""
        turns = list(conversation.turns)
        wrong = next((t for t in turns if t.learn and t.role != "assistant"), None)
        if wrong is not None:
            raise DataError(
                f"a turn of the {wrong.role} is to be learnt, only an assistant's can be",
                where=f"conversation {conversation.group}",
            )
        if len(turns) < 2 or turns[0].role != "system" or turns[1].role != "user":
            return turns
        if self._takes_system is None:
            self._takes_system = self._shows_system()
            if not self._takes_system:
                self.notes.append(
                    "the chat template takes no system turn: its text is put before the first "
                    "question"
                )
        if self._takes_system:
            return turns
        first = Turn("user", f"{turns[0].text}\n\n{turns[1].text}")
        return [first, *turns[2:]]

    def _shows_system(self) -> bool:
        """Whether a system turn is let through, and changes what is written."""
        rest = (Turn("user", "question"), Turn("assistant", "answer"))
        try:
            one, two = (
                self._write([Turn("system", text), *rest], where="")[0] for text in ("one", "two")
            )
        except DataError:
            return False
        return one != two

    def _mask(self, turns: Sequence[Turn]) -> tuple[list[Turn], dict[str, str]]:
        """Control tokens in the texts made private-use characters that nobody typed."""
        if not any(self._control.search(turn.text) for turn in turns):
            return list(turns), {}
        typed = set(chain.from_iterable(turn.text for turn in turns))
        fresh = (chr(code) for code in _PRIVATE if chr(code) not in typed)
        stands: dict[str, str] = {}

        def hide(match: re.Match[str]) -> str:
            token = match.group()
            if token not in stands:
                stands[token] = next(fresh)
            return stands[token] * len(token)

        masked = [Turn(turn.role, self._control.sub(hide, turn.text), turn.learn) for turn in turns]
        return masked, {character: token for token, character in stands.items()}
