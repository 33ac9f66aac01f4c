"""Render a conversation with its chat template, and locate the assistant's turns in the text.

A template is a program: it may add a system prompt, strip texts, refuse roles, or write an earlier
turn differently once later turns follow. So the text is never searched for a turn. An assistant's
turn is the difference between the text of the turns up to it and the prompt that asks for it; both
must be prefixes of the whole text. Or it is the part that ``{% generation %}`` marks.

Control tokens that a user typed (``<|im_end|>`` in a question) are replaced by as many private-use
characters before the template sees them. So every control token in the text comes from the
template.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from sparsegrad_cli.data.conversation import Conversation, DropCounts, Turn
from sparsegrad_cli.errors import DataError, UsageError

# Touvron et al. 2023 (LLaMA 2), appendix A.3.3 and the released code: every pair of turns begins
# with BOS and ends with EOS, and the system prompt is part of the first question.
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
_REASONING = "reasoning_content"
_PRIVATE = range(0x100000, 0x10FFFE)  # supplementary private use area B


@dataclass(frozen=True)
class RenderedChat:
    """The text that a template made of a conversation.

    Attributes:
        text: the text; control tokens that a user typed are masked.
        learnt: (start, end) in characters of each learnt turn, in order, end of turn included.
        masks: private-use character -> the control token that it stands for.
        where: place of the conversation, for errors.
    """

    text: str
    learnt: list[tuple[int, int]]
    masks: Mapping[str, str]
    where: str = "task"

    def unmasked(self, start: int, end: int) -> str:
        """Return the text from ``start`` to ``end`` as the user typed it."""
        part = self.text[start:end]
        for character, token in self.masks.items():
            part = part.replace(character * len(token), token)
        return part


class ChatTemplate:
    """The chat template of a tokenizer, or LLaMA-2's form if it has none.

    Args:
        tokenizer: of transformers.
        control: its control tokens, as text.

    Raises:
        UsageError: the tokenizer has neither a template nor an end token for LLaMA-2's form.
    """

    def __init__(self, tokenizer: Any, control: Iterable[str]) -> None:
        self._notes: list[str] = []
        self._left_out = DropCounts()
        self._variables = dict(tokenizer.special_tokens_map)
        if tokenizer.chat_template is None:
            if tokenizer.eos_token is None:
                raise UsageError(
                    "the tokenizer has neither a chat template nor an end token",
                    where="model.name",
                    fix="set chat_template or eos_token in its tokenizer_config.json",
                )
            self._source = self._tools_source = LLAMA2
            self._notes.append(
                "the tokenizer has no chat template: LLaMA-2's form is used, [INST] ... [/INST]"
            )
        else:
            self._source = tokenizer.get_chat_template()
            # Some tokenizers have another template for conversations with tools.
            self._tools_source = tokenizer.get_chat_template(tools=[{}])
        longest_first = sorted(control, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._takes_system: bool | None = None

    @property
    def notes(self) -> list[str]:
        """What the user should know of the template; may grow with every conversation."""
        left_out = self._left_out
        return self._notes + [
            f"the chat template leaves out {what}: {count} x; first: {left_out.first[what]}"
            for what, count in left_out.counts.items()
        ]

    def render(self, conversation: Conversation) -> RenderedChat:
        """Render a conversation.

        Raises:
            DataError: the template refuses it, or its learnt turns cannot be located.
        """
        chat, masks = self._mask(self._with_system_where_it_goes(conversation))
        marked = _GENERATION.search(self._source_for(chat.tools)) is not None
        text, spans = self._write(chat, marks=marked)
        assistants = [i for i, turn in enumerate(chat.turns) if turn.role == "assistant"]
        if not marked:
            learnt = {i: self._turn(chat, i, text) for i in assistants if chat.turns[i].learn}
        elif len(spans) == len(assistants):
            every = zip(assistants, spans, strict=True)
            learnt = {i: span for i, span in every if chat.turns[i].learn}
        else:
            raise DataError(
                f"the chat template marks {len(spans)} parts as generated in a conversation with "
                f"{len(assistants)} turns of the assistant",
                where=chat.where,
                fix="correct {% generation %} in the tokenizer's chat_template",
            )
        for what in self._lost(chat, text, learnt):
            self._left_out.add(what, chat.where)
        return RenderedChat(text, list(learnt.values()), masks, chat.where)

    def prompt(self, turns: Sequence[Turn]) -> RenderedChat:
        """Render the prompt that asks for an answer to the turns; nothing in it is learnt.

        Raises:
            DataError: the template refuses the turns.
        """
        chat = Conversation(tuple(turns), "to be answered", place="the conversation")
        masked, masks = self._mask(self._with_system_where_it_goes(chat))
        text, _ = self._write(masked, prompt=True)
        return RenderedChat(text, [], masks, chat.where)

    def _turn(self, chat: Conversation, i: int, text: str) -> tuple[int, int]:
        """Locate turn ``i`` in the text by rendering the turns before it and up to it."""
        if i == 0:
            raise DataError(
                "the first turn is the assistant's and is learnt: nothing asks for it",
                where=chat.where,
                fix="put a system or user turn before it",
            )
        before, _ = self._write(replace(chat, turns=chat.turns[:i]), prompt=True)
        after, _ = self._write(replace(chat, turns=chat.turns[: i + 1]))
        if after.startswith(before) and text.startswith(after):
            return len(before), len(after)
        if not after.startswith(before):
            what = "the chat template does not begin an assistant's turn with its prompt for one"
            fix = "mark what is generated by {% generation %} in the tokenizer's chat_template"
        else:
            what = (
                f"the chat template writes turn {i + 1} differently once others follow: its tokens "
                "cannot be located"
            )
            fix = (
                "task.chat.train_on=last_answer learns the last answer only; or mark what is "
                "generated by {% generation %} in the tokenizer's chat_template"
            )
        raise DataError(what, where=chat.where, fix=fix)

    def _lost(
        self, chat: Conversation, text: str, learnt: Mapping[int, tuple[int, int]]
    ) -> Iterator[str]:
        """Yield what the conversation has and the template's text lacks, white space aside.

        Turns of the assistant that are not learnt are not checked: templates leave earlier
        reasoning out of the prompt on purpose.
        """
        whole = _without_space(text)
        for i, turn in enumerate(chat.turns):
            said = _without_space(text[slice(*learnt[i])]) if i in learnt else whole
            of = "to be learnt" if i in learnt else f"of the {turn.role}"
            if turn.role == "assistant" and i not in learnt:
                pass
            elif _without_space(turn.text) not in said:
                yield f"text {of}"
            elif _without_space(turn.extra.get(_REASONING, "")) not in said:
                yield f"reasoning {of}"
            # Only the template knows their form, so the text must change without them.
            for key in turn.extra.keys() & {"tool_calls", "name"}:
                extra = {name: value for name, value in turn.extra.items() if name != key}
                without = list(chat.turns)
                without[i] = replace(turn, extra=extra)
                if self._renders_same(replace(chat, turns=tuple(without)), text):
                    yield f"{key} {of}"
        if chat.tools and self._renders_same(replace(chat, tools=None), text):
            yield "tools"

    def _renders_same(self, chat: Conversation, text: str) -> bool:
        """Return whether the template makes the same text of another conversation."""
        try:
            return self._write(chat)[0] == text
        except DataError:
            return False

    def _source_for(self, tools: Any) -> str:
        return self._tools_source if tools else self._source

    def _write(
        self, chat: Conversation, *, prompt: bool = False, marks: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the template's text, and the spans that it marks as generated."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                [[_message(turn) for turn in chat.turns]],
                tools=chat.tools,
                chat_template=self._source_for(chat.tools),
                return_assistant_tokens_mask=marks,
                add_generation_prompt=prompt,
                **self._variables,
            )
        except (TemplateError, TypeError, ValueError, KeyError, RecursionError) as error:
            raise DataError(
                f"the chat template refuses the conversation: {error}",
                where=chat.where,
                fix="most templates take at most one system turn, then user and assistant "
                "alternating; some take no turns and calls of tools",
            ) from error
        return texts[0], [(start, end) for start, end in spans[0]] if marks else []

    def _with_system_where_it_goes(self, conversation: Conversation) -> Conversation:
        """Put the system's text before the first question if the template takes no system turn."""
        turns = conversation.turns
        wrong = next((t for t in turns if t.learn and t.role != "assistant"), None)
        if wrong is not None:
            raise DataError(
                f"a turn of the {wrong.role} is marked as learnt; only an assistant's can be",
                where=conversation.where,
            )
        if len(turns) < 2 or turns[0].role != "system" or turns[1].role != "user":
            return conversation
        if self._takes_system is None:
            self._takes_system = self._shows_system()
            if not self._takes_system:
                self._notes.append(
                    "the chat template takes no system turn: its text is put before the first "
                    "question"
                )
        if self._takes_system:
            return conversation
        first = replace(turns[1], text=f"{turns[0].text}\n\n{turns[1].text}")
        return replace(conversation, turns=(first, *turns[2:]))

    def _shows_system(self) -> bool:
        """Return whether the template accepts a system turn, and writes its text."""
        rest = (Turn("user", "question"), Turn("assistant", "answer"))
        try:
            one, two = (
                self._write(Conversation((Turn("system", text), *rest), ""))[0]
                for text in ("one", "two")
            )
        except DataError:
            return False
        return one != two

    def _mask(self, chat: Conversation) -> tuple[Conversation, dict[str, str]]:
        """Replace control tokens in the texts by private-use characters that nobody typed."""
        texts = list(_strings([[turn.text, turn.extra] for turn in chat.turns]))
        texts += _strings(chat.tools)
        if not any(self._control.search(text) for text in texts):
            return chat, {}
        typed = set(chain.from_iterable(texts))
        fresh = (chr(code) for code in _PRIVATE if chr(code) not in typed)
        stands_for: dict[str, str] = {}

        def hide(match: re.Match[str]) -> str:
            token = match.group()
            if token not in stands_for:
                stands_for[token] = next(fresh)
            return stands_for[token] * len(token)

        def masked(value: Any) -> Any:
            if isinstance(value, str):
                return self._control.sub(hide, value)
            if isinstance(value, Mapping):
                return {masked(key): masked(each) for key, each in value.items()}
            return [masked(each) for each in value] if isinstance(value, list) else value

        turns = tuple(
            replace(turn, text=masked(turn.text), extra=masked(turn.extra)) for turn in chat.turns
        )
        tools = masked(chat.tools)
        masks = {character: token for token, character in stands_for.items()}
        return replace(chat, turns=turns, tools=tools), masks


def _message(turn: Turn) -> dict[str, Any]:
    """Return a turn as templates take it, with reasoning under each of its common names."""
    message = {"role": turn.role, "content": turn.text, **turn.extra}
    if _REASONING in message:
        message |= {"reasoning": message[_REASONING], "thinking": message[_REASONING]}
    return message


def _without_space(text: str) -> str:
    return "".join(text.split())


def _strings(value: Any) -> Iterator[str]:
    """Yield every string in nested data."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for pair in value.items():
            yield from _strings(list(pair))
    elif isinstance(value, list):
        for each in value:
            yield from _strings(each)
