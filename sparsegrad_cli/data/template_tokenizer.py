"""Token ids of a chat template's text, piece by piece, so that every token has one owner.

The text is cut at the template's control tokens and where an assistant's turn begins and ends. A
control token is its id; any other piece is plain text, and encoded so that nothing in it becomes a
control token, whoever typed it. No token lies across a cut: the ids before an assistant's turn are
those a model is prompted with.

The ids are what the tokenizer makes of the whole text. That is put to the proof once, on a
conversation in the same template (:meth:`PieceEncoder.prove`): tokenizers with a space in front of
every text (SentencePiece) need a character before a piece that is taken off again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

from sparsegrad_cli.data.chat_template import ChatText
from sparsegrad_cli.errors import DataError, UsageError

_ANCHORS = ("", "\n")  # what is put before a piece, and taken off again


@dataclass(frozen=True)
class Piece:
    """A part of the text and its tokens.

    Attributes:
        start, end: in characters of the text.
        ids: its tokens.
        control: it is one control token, written by the template.
    """

    start: int
    end: int
    ids: Sequence[int]
    control: bool


@dataclass(frozen=True)
class _Cut:
    start: int
    end: int
    after: str  # what stands before: "start" of the text, "control" token, or a "cut"
    control: str | None


class PieceEncoder:
    """Encodes the text of a chat template.

    Args:
        tokenizer: of transformers, by the tokenizers library. It is not changed.

    Attributes:
        control: its control tokens, and their ids. Added tokens that are not special (tags such as
            ``<think>``, which an assistant may well write) are ordinary vocabulary.

    Raises:
        UsageError: a tokenizer in Python.
    """

    def __init__(self, tokenizer: Any) -> None:
        from tokenizers import Tokenizer

        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UsageError(
                f"{type(tokenizer).__name__} is a tokenizer in Python: chat data needs one of the "
                "tokenizers library",
                where="model.name",
                fix="a model whose folder holds a tokenizer.json",
            )
        self._tokenizer = tokenizer
        added = [t for t in tokenizer.added_tokens_decoder.values() if t.special]
        texts = {*tokenizer.all_special_tokens, *(token.content for token in added)}
        self.control = {t: int(tokenizer.convert_tokens_to_ids(t)) for t in texts if t}
        # Unknown letters are one too, and may stand in any text.
        self._ids = {*self.control.values()} - {tokenizer.unk_token_id}
        self._named = {text.strip(): text for text in self.control}
        content = json.loads(backend.to_str())
        for token in content["added_tokens"]:
            token["special"] = token["content"] in self.control
        self._plain = Tokenizer.from_str(json.dumps(content))
        self._plain.encode_special_tokens = True  # special tokens are read as text
        self._plain.no_truncation()
        self._plain.no_padding()
        # Some control tokens take the space around them along: it is part of their match.
        spaces = {t.content: (r"\s*" * t.lstrip, r"\s*" * t.rstrip) for t in added}
        forms = []
        for text in sorted(self.control, key=len, reverse=True):
            left, right = spaces.get(text, ("", ""))
            forms.append(f"{left}(?:{re.escape(text)}){right}")
        self._split = re.compile("|".join(forms) or r"(?!)")
        self._anchors = {"start": "", "control": "", "cut": ""}

    def prove(self, chat: ChatText) -> None:
        """Find out, on a text without typed control tokens, how its pieces are to be encoded.

        Raises:
            UsageError: the tokenizer makes other tokens of the pieces than of the whole.
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
            "where the assistant begins or ends to speak in this chat template is in the middle of "
            "a token: what is learnt would not be what follows the prompt",
            where="model.name",
            fix="does the template's prompt end in a space? take it out of chat_template",
        )

    def encode(self, chat: ChatText) -> list[Piece]:
        """The pieces of a text in order.

        Raises:
            DataError: a typed control token cannot be told from a true one.
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
                    "the tokenizer cannot encode this text by itself: "
                    f"{chat.unmasked(cut.start, cut.end)[:60]!r}",
                    where=chat.where,
                )
            pieces.append(Piece(cut.start, cut.end, ids[len(head) :], False))
        return pieces

    def _cut(self, chat: ChatText) -> list[_Cut]:
        """The text cut at control tokens and at the ends of learnt turns."""
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
