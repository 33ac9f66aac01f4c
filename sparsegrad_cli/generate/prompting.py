"""Turns of a conversation as the token ids that ask a model for the next one, as it learnt them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparsegrad_cli.data.chat_template import ChatTemplate
from sparsegrad_cli.data.conversation import Conversation, Turn
from sparsegrad_cli.data.template_tokenizer import TemplateTokenizer
from sparsegrad_cli.errors import DataError

_ASKED = (Turn("user", "Is 12 more than 7?"),)
_TOLD = (*_ASKED, Turn("assistant", "It is, by 5."), Turn("user", "And 7?"))


class ChatPrompts:
    """The chat template of a tokenizer, from the asking side.

    Control tokens that somebody typed are text, as in training.

    Args:
        tokenizer: of transformers. It is not changed.

    Attributes:
        end: token ids at which an assistant's turn is over.
        notes: what the user should know of the template.

    Raises:
        UsageError: as :class:`ChatTemplate` and :class:`TemplateTokenizer`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._pieces = TemplateTokenizer(tokenizer)
        self._template = ChatTemplate(tokenizer, self._pieces.control)
        self._pieces.fit(self._template.prompt(_TOLD))
        own = tokenizer.eos_token_id
        self.end = self._ends_of_turn() | ({own} if own is not None else set())

    @property
    def notes(self) -> list[str]:
        """May grow with what is asked."""
        return self._template.notes

    def ids(self, turns: Sequence[Turn]) -> list[int]:
        """Token ids of the turns and of what asks for an answer.

        Raises:
            DataError: the template refuses the turns.
        """
        chat = self._template.prompt(turns)
        return [i for piece in self._pieces.encode(chat) for i in piece.ids]

    def _ends_of_turn(self) -> set[int]:
        """The control token that the template writes behind an answer, if it does."""
        probe = Conversation((*_ASKED, Turn("assistant", "It is, by 5.", learn=True)), "probe")
        try:
            chat = self._template.render(probe)
        except DataError:
            return set()  # it writes an answer otherwise than it asks for one: eos must do
        ((start, end),) = chat.learnt
        last = [p for p in self._pieces.encode(chat) if p.control and start <= p.start < end]
        return set(last[-1].ids) if last else set()
