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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from sparsegrad_cli.data.chat_data import DropCounts
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
_REASONING = "reasoning_content"
_PRIVATE = range(0x100000, 0x10FFFE)  # supplementary private use area B


@dataclass(frozen=True)
class ChatText:
    """What the template wrote.

    Attributes:
        text: with control tokens of the turns masked.
        learnt: (start, end) in characters of each learnt turn, in order, end of turn included.
        masks: private-use character -> the control token it stands for, repeated to its length.
        where: the place of the conversation, for errors.
    """

    text: str
    learnt: list[tuple[int, int]]
    masks: Mapping[str, str]
    where: str = "task"

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

    Raises:
        UsageError: no template, and no end token that LLaMA-2's form needs.
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
            # Some tokenizers have a template of its own for conversations with tools.
            self._tools_source = tokenizer.get_chat_template(tools=[{}])
        longest_first = sorted(control, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._takes_system: bool | None = None

    @property
    def notes(self) -> list[str]:
        """What the user should know of the template; may grow with what is rendered."""
        left_out = self._left_out
        return self._notes + [
            f"the chat template leaves out {what}: {count} x; first: {left_out.first[what]}"
            for what, count in left_out.counts.items()
        ]

    def render(self, conversation: Conversation) -> ChatText:
        """What the template makes of a conversation.

        Raises:
            DataError: the template refuses it, or does not let the learnt turns be told.
        """
        asked, masks = self._mask(self._with_system_where_it_goes(conversation))
        marked = _GENERATION.search(self._source_for(asked.tools)) is not None
        text, spans = self._write(asked, marks=marked)
        assistants = [i for i, turn in enumerate(asked.turns) if turn.role == "assistant"]
        if not marked:
            learnt = {i: self._turn(asked, i, text) for i in assistants if asked.turns[i].learn}
        elif len(spans) == len(assistants):
            every = zip(assistants, spans, strict=True)
            learnt = {i: span for i, span in every if asked.turns[i].learn}
        else:
            raise DataError(
                f"the chat template marks {len(spans)} parts as generated in a conversation with "
                f"{len(assistants)} turns of the assistant",
                where=asked.where,
                fix="mend {% generation %} in the tokenizer's chat_template",
            )
        for what in self._lost(asked, text, learnt):
            self._left_out.add(what, asked.where)
        return ChatText(text, list(learnt.values()), masks, asked.where)

    def prompt(self, turns: Sequence[Turn]) -> ChatText:
        """What the template writes to ask for an answer to the turns; nothing in it is learnt.

        Raises:
            DataError: the template refuses them.
        """
        asked = Conversation(tuple(turns), "to be answered", place="the conversation")
        masked, masks = self._mask(self._with_system_where_it_goes(asked))
        text, _ = self._write(masked, prompt=True)
        return ChatText(text, [], masks, asked.where)

    def _turn(self, asked: Conversation, i: int, text: str) -> tuple[int, int]:
        """Where turn i stands in the text, from the texts of the turns before and up to it."""
        if i == 0:
            raise DataError(
                "the assistant speaks first and is to be learnt: nothing asks for that turn",
                where=asked.where,
                fix="put a system or user turn before it",
            )
        before, _ = self._write(replace(asked, turns=asked.turns[:i]), prompt=True)
        after, _ = self._write(replace(asked, turns=asked.turns[: i + 1]))
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
            fix = (
                "task.chat.train_on=last_answer learns the last answer only; or mark what is "
                "generated by {% generation %} in the tokenizer's chat_template"
            )
        raise DataError(what, where=asked.where, fix=fix)

    def _lost(
        self, asked: Conversation, text: str, learnt: Mapping[int, tuple[int, int]]
    ) -> Iterator[str]:
        """What the conversation holds and the template's text does not, white space aside.

        The text of an assistant's turn that is not learnt is not looked for: templates leave
        earlier reasoning out of the prompt on purpose.
        """
        whole = _letters(text)
        for i, turn in enumerate(asked.turns):
            said = _letters(text[slice(*learnt[i])]) if i in learnt else whole
            of = "to be learnt" if i in learnt else f"of the {turn.role}"
            if turn.role == "assistant" and i not in learnt:
                pass
            elif _letters(turn.text) not in said:
                yield f"text {of}"
            elif _letters(turn.extra.get(_REASONING, "")) not in said:
                yield f"reasoning {of}"
            # Written in a form that only the template knows: the text must depend on it.
            for key in turn.extra.keys() & {"tool_calls", "name"}:
                extra = {name: value for name, value in turn.extra.items() if name != key}
                without = list(asked.turns)
                without[i] = replace(turn, extra=extra)
                if self._same(replace(asked, turns=tuple(without)), text):
                    yield f"{key} {of}"
        if asked.tools and self._same(replace(asked, tools=None), text):
            yield "tools"

    def _same(self, asked: Conversation, text: str) -> bool:
        """Whether the template writes this text of another conversation, too."""
        try:
            return self._write(asked)[0] == text
        except DataError:
            return False

    def _source_for(self, tools: Any) -> str:
        return self._tools_source if tools else self._source

    def _write(
        self, asked: Conversation, *, prompt: bool = False, marks: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """The template's text, and the spans it marks as generated."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                [[_message(turn) for turn in asked.turns]],
                tools=asked.tools,
                chat_template=self._source_for(asked.tools),
                return_assistant_tokens_mask=marks,
                add_generation_prompt=prompt,
                **self._variables,
            )
        except (TemplateError, TypeError, ValueError, KeyError, RecursionError) as error:
            raise DataError(
                f"the chat template refuses the conversation: {error}",
                where=asked.where,
                fix="most templates want one system turn at most, then user and assistant in turn; "
                "not every one takes turns and calls of tools",
            ) from error
        return texts[0], [(start, end) for start, end in spans[0]] if marks else []

    def _with_system_where_it_goes(self, conversation: Conversation) -> Conversation:
        """The system's turn put before the first question if the template takes none."""
        turns = conversation.turns
        wrong = next((t for t in turns if t.learn and t.role != "assistant"), None)
        if wrong is not None:
            raise DataError(
                f"a turn of the {wrong.role} is to be learnt, only an assistant's can be",
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
        """Whether a system turn is let through, and changes what is written."""
        rest = (Turn("user", "question"), Turn("assistant", "answer"))
        try:
            one, two = (
                self._write(Conversation((Turn("system", text), *rest), ""))[0]
                for text in ("one", "two")
            )
        except DataError:
            return False
        return one != two

    def _mask(self, asked: Conversation) -> tuple[Conversation, dict[str, str]]:
        """Control tokens in the texts made private-use characters that nobody typed."""
        texts = list(_strings([[turn.text, turn.extra] for turn in asked.turns]))
        texts += _strings(asked.tools)
        if not any(self._control.search(text) for text in texts):
            return asked, {}
        typed = set(chain.from_iterable(texts))
        fresh = (chr(code) for code in _PRIVATE if chr(code) not in typed)
        stands: dict[str, str] = {}

        def hide(match: re.Match[str]) -> str:
            token = match.group()
            if token not in stands:
                stands[token] = next(fresh)
            return stands[token] * len(token)

        def masked(value: Any) -> Any:
            if isinstance(value, str):
                return self._control.sub(hide, value)
            if isinstance(value, Mapping):
                return {masked(key): masked(each) for key, each in value.items()}
            return [masked(each) for each in value] if isinstance(value, list) else value

        turns = tuple(
            replace(turn, text=masked(turn.text), extra=masked(turn.extra)) for turn in asked.turns
        )
        tools = masked(asked.tools)
        masks = {character: token for token, character in stands.items()}
        return replace(asked, turns=turns, tools=tools), masks


def _message(turn: Turn) -> dict[str, Any]:
    """A turn as templates take it; reasoning under each of the names by which they know it."""
    message = {"role": turn.role, "content": turn.text, **turn.extra}
    if _REASONING in message:
        message |= {"reasoning": message[_REASONING], "thinking": message[_REASONING]}
    return message


def _letters(text: str) -> str:
    return "".join(text.split())


def _strings(value: Any) -> Iterator[str]:
    """Every string in nested data."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for pair in value.items():
            yield from _strings(list(pair))
    elif isinstance(value, list):
        for each in value:
            yield from _strings(each)
