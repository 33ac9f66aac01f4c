"""Conversations to token ids, with the loss on what the assistant is to learn and on nothing else.

Labelled are the tokens of an assistant's learnt turn up to its end-of-turn token, which is what
makes a model stop; not the header before it, nor the line break that a template may write behind.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsegrad_cli.data.batches import UNLABELLED, token_rows
from sparsegrad_cli.data.chat_template import ChatTemplate
from sparsegrad_cli.data.conversation import Conversation, Turn
from sparsegrad_cli.data.template_tokenizer import Piece, PieceEncoder
from sparsegrad_cli.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

_CHUNK = 1000  # conversations made a table at a time: bounds the memory that Python lists take


class ChatEncoder:
    """A tokenizer and its chat template, proven to fit each other.

    Args:
        tokenizer: of transformers; needs no pad token. It is not changed.

    Attributes:
        notes: what the user should know; may grow with what is encoded.

    Raises:
        UsageError: as :class:`ChatTemplate` and :class:`PieceEncoder`, or where the tokens of what
            the assistant says cannot be told.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._pieces = PieceEncoder(tokenizer)
        self._template = ChatTemplate(tokenizer, self._pieces.control)
        self._end = tokenizer.eos_token_id
        try:
            chat = self._template.render(_probe(learn_all=True))
        except DataError:  # a template that writes the last turn otherwise than those before
            chat = self._template.render(_probe(learn_all=False))
        self._pieces.prove(chat)
        self._endless = False

    @property
    def notes(self) -> list[str]:
        """Of the template, and of turns without an end."""
        endless = "the chat template ends an assistant's turn without a control token"
        return [*self._template.notes, *([endless] if self._endless else [])]

    def encode(
        self, conversation: Conversation, *, max_length: int
    ) -> tuple[list[int], list[int], bool]:
        """Token ids, labels (-100 where nothing is learnt), and whether max_length cut any off.

        Tokens behind the last labelled one are left out: no loss depends on them. Both lists are
        empty if none is labelled within max_length; the first token, which nothing comes before,
        never is.

        Raises:
            DataError: the template or the tokenizer cannot take the conversation.
        """
        chat = self._template.render(conversation)
        pieces = self._pieces.encode(chat)
        learnt = self._learnt(pieces, chat.learnt, chat.text)
        ids = [i for piece in pieces for i in piece.ids]
        labels = [
            i if learns else UNLABELLED
            for piece, learns in zip(pieces, learnt, strict=True)
            for i in piece.ids
        ]
        labels[:1] = [UNLABELLED]
        last = _last_labelled(labels)
        kept = _last_labelled(labels[:max_length])
        return ids[: kept + 1], labels[: kept + 1], kept < last

    def _learnt(
        self, pieces: Sequence[Piece], spans: Sequence[tuple[int, int]], text: str
    ) -> list[bool]:
        """Which pieces are labelled."""
        learnt = [False] * len(pieces)
        for start, end in spans:
            inside = [k for k, p in enumerate(pieces) if start <= p.start and p.end <= end]
            if not inside:
                continue
            controls = [k for k in inside if pieces[k].control]
            behind = [k for k in inside if controls and k > controls[-1]]
            if behind and text[pieces[behind[0]].start : end].isspace():
                inside = inside[: -len(behind)]
            follower = inside[-1] + 1
            if not controls and follower < len(pieces) and pieces[follower].ids == [self._end]:
                inside.append(follower)  # a template that leaves it out of {% generation %}
            elif not controls:
                self._endless = True
            for k in inside:
                learnt[k] = True
        return learnt


@dataclass(frozen=True)
class EncodedChats:
    """Conversations as token ids.

    Attributes:
        data: columns ``input_ids`` and ``labels`` (int32), rows at their own length, in order.
        labelled: labelled tokens in all.
        counts: conversations encoded, cut and dropped, in words.
        too_long: a note on conversations that were cut or dropped; None if there are none.
    """

    data: Dataset
    labelled: int
    counts: dict[str, int]
    too_long: str | None = None


def encode_conversations(
    encoder: ChatEncoder,
    conversations: Iterable[Conversation],
    *,
    max_length: int,
    split: str = "training",
    enough: int | None = None,
) -> EncodedChats:
    """A data set of token ids; conversations with nothing to learn within max_length are dropped.

    Args:
        encoder: keeps the notes.
        conversations: of one split.
        max_length: tokens kept of a conversation, from its beginning.
        split: its name, for the error.
        enough: the first n that are not dropped; None takes all.

    Raises:
        DataError: nothing is left, or as :meth:`ChatEncoder.encode`.
    """
    from datasets import concatenate_datasets

    ids: list[list[int]] = []
    labels: list[list[int]] = []
    parts, labelled, total, cut, dropped = [], 0, 0, 0, 0
    for conversation in conversations:
        if total - dropped == enough:
            break
        row, row_labels, was_cut = encoder.encode(conversation, max_length=max_length)
        total += 1
        dropped += not row
        cut += bool(row) and was_cut
        if not row:
            continue
        labelled += len(row_labels) - row_labels.count(UNLABELLED)
        ids.append(row)
        labels.append(row_labels)
        if len(ids) == _CHUNK:
            parts.append(token_rows(ids, labels))
            ids, labels = [], []
    if ids:
        parts.append(token_rows(ids, labels))
    if not parts:
        raise DataError(
            f"no conversation of the {split} split has a token to learn within max_length "
            f"{max_length}"
            if total
            else f"the {split} split holds no conversation",
            where="task.max_length" if total else "task",
            fix="a longer max_length: the first answer must begin within it" if total else None,
        )
    counts = {
        "conversations": total - dropped,
        "cut to max_length": cut,
        "dropped, nothing to learn within max_length": dropped,
    }
    too_long = None
    if cut or dropped:
        too_long = f"{split} conversations longer than max_length {max_length}: "
        too_long += f"{cut} cut, {dropped} dropped, because no answer begins within it"
    return EncodedChats(concatenate_datasets(parts), labelled, counts, too_long)


def _last_labelled(labels: Sequence[int]) -> int:
    """Position of the last labelled token, -1 if there is none."""
    return next((k for k in reversed(range(len(labels))) if labels[k] != UNLABELLED), -1)


def _probe(*, learn_all: bool) -> Conversation:
    """Plain words, to find out how a template and a tokenizer go together."""
    turns = (
        Turn("user", "Is 12 more than 7?"),
        Turn("assistant", "It is, by 5.", learn_all),
        Turn("user", "And 7?"),
        Turn("assistant", "No: they are equal.", True),
    )
    return Conversation(turns, "made up to try the chat template")
