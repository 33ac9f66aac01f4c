"""Tokenize the text of a chat template in pieces, so that every token belongs to one turn.

The text is cut at the template's control tokens, and where an assistant's turn begins and ends. A
control token becomes its id. Any other piece is encoded as plain text, so that a user cannot type
a control token. No token crosses a cut, so the ids before an assistant's turn are exactly the
prompt that a model is given.

The ids equal those of the whole text. :meth:`TemplateTokenizer.fit` checks this once for each
template: tokenizers that put a space before every text (SentencePiece) need a character before a
piece, whose tokens are then removed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

from sparsegrad_cli.data.chat_template import RenderedChat
from sparsegrad_cli.errors import DataError, UsageError

_ANCHORS = ("", "\n")  # candidates for the character before a piece


@dataclass(frozen=True)
class Piece:
    """A part of the text and its tokens.

    Attributes:
        start: first character.
        end: character after the last one.
        ids: its token ids.
        control: whether it is one control token that the template wrote.
    """

    start: int
    end: int
    ids: Sequence[int]
    control: bool


@dataclass(frozen=True)
class _Cut:
    start: int
    end: int
    after: str  # what comes before it: "start" of the text, "control" token, or a "cut"
    control: str | None  # its control token; None for plain text


class TemplateTokenizer:
    """Tokenizer for the text of a chat template.

    Args:
        tokenizer: of transformers, based on the tokenizers library. It is not changed.

    Attributes:
        control: control token -> its id. Added tokens that are not special (tags such as
            ``<think>``, which an assistant may write) are ordinary vocabulary.

    Raises:
        UsageError: the tokenizer is written in Python.
    """

    def __init__(self, tokenizer: Any) -> None:
        from tokenizers import Tokenizer

        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UsageError(
                f"{type(tokenizer).__name__} is written in Python: chat data needs a tokenizer of "
                "the tokenizers library",
                where="model.name",
                fix="use a model whose folder holds a tokenizer.json",
            )
        self._tokenizer = tokenizer
        added = [t for t in tokenizer.added_tokens_decoder.values() if t.special]
        texts = {*tokenizer.all_special_tokens, *(token.content for token in added)}
        self.control = {t: int(tokenizer.convert_tokens_to_ids(t)) for t in texts if t}
        # The unknown token is a control token, too, but any text may contain unknown letters.
        self._ids = {*self.control.values()} - {tokenizer.unk_token_id}
        self._named = {text.strip(): text for text in self.control}
        content = json.loads(backend.to_str())
        for token in content["added_tokens"]:
            token["special"] = token["content"] in self.control
        self._plain = Tokenizer.from_str(json.dumps(content))
        self._plain.encode_special_tokens = True  # read special tokens as text
        self._plain.no_truncation()
        self._plain.no_padding()
        # The match of some control tokens includes the space around them.
        spaces = {t.content: (r"\s*" * t.lstrip, r"\s*" * t.rstrip) for t in added}
        forms = []
        for text in sorted(self.control, key=len, reverse=True):
            left, right = spaces.get(text, ("", ""))
            forms.append(f"{left}(?:{re.escape(text)}){right}")
        self._split = re.compile("|".join(forms) or r"(?!)")
        self._anchors = {"start": "", "control": "", "cut": ""}

    def fit(self, chat: RenderedChat) -> None:
        """Find out how pieces must be encoded so that they give the tokens of the whole text.

        Args:
            chat: a text in which no user typed a control token.

        Raises:
            UsageError: the pieces give other tokens than the whole text.
        """
        whole = list(self._tokenizer(chat.text, add_special_tokens=False)["input_ids"])
        for control, cut in product(_ANCHORS, _ANCHORS):
            self._anchors = {"start": "", "control": control, "cut": cut}
            try:
                if [i for piece in self.encode(chat) for i in piece.ids] == whole:
                    return
            except DataError:
                continue
        raise UsageError(
            "in this chat template, the assistant's turn begins or ends in the middle of a token: "
            "the learnt text would not be what follows the prompt",
            where="model.name",
            fix="if the template's prompt ends in a space, remove it from chat_template",
        )

    def encode(self, chat: RenderedChat) -> list[Piece]:
        """Return the pieces of a text in order.

        Raises:
            DataError: a typed control token cannot be told from one of the template.
        """
        cuts = self._cut(chat)
        plain = [cut for cut in cuts if cut.control is None]
        texts = [chat.unmasked(cut.start, cut.end) for cut in plain]
        anchored = [self._anchors[cut.after] for cut in plain]
        encoded = iter(
            self._plain.encode_batch_fast(
                [anchor + text for anchor, text in zip(anchored, texts, strict=True)],
                add_special_tokens=False,
            )
        )
        heads = {
            anchor: self._plain.encode(anchor, add_special_tokens=False).ids
            for anchor in set(anchored)
        }
        pieces = []
        for cut in cuts:
            if cut.control is not None:
                pieces.append(Piece(cut.start, cut.end, [self.control[cut.control]], True))
                continue
            head = heads[self._anchors[cut.after]]
            ids = next(encoded).ids
            if ids[: len(head)] != head or self._ids.intersection(ids):
                raise DataError(
                    "the tokenizer cannot encode this text separately: "
                    f"{chat.unmasked(cut.start, cut.end)[:60]!r}",
                    where=chat.where,
                )
            pieces.append(Piece(cut.start, cut.end, ids[len(head) :], False))
        return pieces

    def _cut(self, chat: RenderedChat) -> list[_Cut]:
        """Cut the text at control tokens and at both ends of learnt turns."""
        edges = sorted({edge for span in chat.learnt for edge in span})
        cuts: list[_Cut] = []

        def plain(start: int, end: int) -> None:
            inner = [start, *(edge for edge in edges if start < edge < end), end]
            for left, right in pairwise(inner):
                if left < right:
                    after = "cut" if left > start else "control" if cuts else "start"
                    cuts.append(_Cut(left, right, after, None))

        position = 0
        for match in self._split.finditer(chat.text):
            plain(position, match.start())
            cuts.append(_Cut(match.start(), match.end(), "", self._named[match.group().strip()]))
            position = match.end()
        plain(position, len(chat.text))
        return cuts
