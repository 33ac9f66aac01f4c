"""Turn conversations into token ids, with labels on the learnt turns of the assistant only.

Labels cover a learnt turn and its end-of-turn token, which teaches the model to stop. They do not
cover the header before the turn, or a line break that the template writes after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sparsegrad_cli.data.batches import UNLABELLED, token_rows
from sparsegrad_cli.data.chat_template import ChatTemplate
from sparsegrad_cli.data.conversation import Conversation, Turn
from sparsegrad_cli.data.template_tokenizer import Piece, TemplateTokenizer
from sparsegrad_cli.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

_CHUNK = 1000  # conversations per table, to bound the memory of Python lists


class ChatEncoder:
    """Encode conversations by a tokenizer and its chat template.

    Args:
        tokenizer: of transformers; needs no pad token. It is not changed.

    Raises:
        UsageError: as :class:`ChatTemplate` and :class:`TemplateTokenizer`, or the tokens of the
            assistant cannot be told from the others.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = TemplateTokenizer(tokenizer)
        self._template = ChatTemplate(tokenizer, self._tokenizer.control)
        self._end = tokenizer.eos_token_id
        try:
            chat = self._template.render(_probe(learn_all=True))
        except DataError:  # the template writes the last turn differently from earlier ones
            chat = self._template.render(_probe(learn_all=False))
        self._tokenizer.fit(chat)
        self._endless = False

    @property
    def notes(self) -> list[str]:
        """What the user should know of the template; may grow with every conversation."""
        endless = "the chat template ends an assistant's turn without a control token"
        return [*self._template.notes, *([endless] if self._endless else [])]

    def encode(
        self, conversation: Conversation, *, max_length: int
    ) -> tuple[list[int], list[int], bool]:
        """Encode one conversation.

        Tokens after the last labelled one are left out, because no loss depends on them. The first
        token never has a label, because nothing predicts it.

        Returns:
            Token ids; labels, -100 for tokens without a loss; and whether ``max_length`` cut off a
            labelled token. Both lists are empty if no token within ``max_length`` is labelled.

        Raises:
            DataError: the template or the tokenizer cannot encode the conversation.
        """
        chat = self._template.render(conversation)
        pieces = self._tokenizer.encode(chat)
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
        """Return for each piece whether it is labelled."""
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
                inside.append(follower)  # the template has it outside of {% generation %}
            elif not controls:
                self._endless = True
            for k in inside:
                learnt[k] = True
        return learnt


@dataclass(frozen=True)
class EncodedChats:
    """Conversations as token ids.

    Attributes:
        data: columns ``input_ids`` and ``labels`` (lists of int32), in order.
        counts: what was encoded, cut and dropped -> how many; each begins with the split's name.
        too_long: a note on conversations that were cut or dropped; None if there are none.
        kept: positions of the conversations that were not dropped.
    """

    data: Dataset
    counts: dict[str, int]
    too_long: str | None = None
    kept: list[int] = field(default_factory=list)


def encode_conversations(
    encoder: ChatEncoder,
    conversations: Iterable[Conversation],
    *,
    max_length: int,
    split: str = "training",
    enough: int | None = None,
) -> EncodedChats:
    """Encode conversations; those without a labelled token within ``max_length`` are dropped.

    Args:
        encoder: collects the notes.
        conversations: of one split.
        max_length: tokens kept of a conversation, from its beginning.
        split: name of the split, for counts and messages.
        enough: stop after this many conversations that are not dropped; None takes all.

    Raises:
        DataError: no conversation is left, or as :meth:`ChatEncoder.encode`.
    """
    from datasets import concatenate_datasets

    ids: list[list[int]] = []
    labels: list[list[int]] = []
    parts, labelled, total, cut, dropped = [], 0, 0, 0, 0
    kept: list[int] = []
    for conversation in conversations:
        if total - dropped == enough:
            break
        row, row_labels, was_cut = encoder.encode(conversation, max_length=max_length)
        total += 1
        dropped += not row
        cut += bool(row) and was_cut
        if not row:
            continue
        kept.append(total - 1)
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
            fix="raise it: the first answer must begin within it" if total else None,
        )
    counts = {
        f"{split}: conversations": total - dropped,
        f"{split}: cut to max_length": cut,
        f"{split}: dropped, nothing to learn within max_length": dropped,
        f"{split}: labelled tokens": labelled,
    }
    too_long = None
    if cut or dropped:
        too_long = f"{split} conversations longer than max_length {max_length}: "
        too_long += f"{cut} cut, {dropped} dropped, because no answer begins within it"
    return EncodedChats(concatenate_datasets(parts), counts, too_long, kept)


def _last_labelled(labels: Sequence[int]) -> int:
    """Return the position of the last labelled token, -1 if there is none."""
    return next((k for k in reversed(range(len(labels))) if labels[k] != UNLABELLED), -1)


def _probe(*, learn_all: bool) -> Conversation:
    """Return a conversation to find out how a template and a tokenizer work together."""
    turns = (
        Turn("user", "Is 12 more than 7?"),
        Turn("assistant", "It is, by 5.", learn_all),
        Turn("user", "And 7?"),
        Turn("assistant", "No: they are equal.", True),
    )
    return Conversation(turns, "made up to try the chat template")
