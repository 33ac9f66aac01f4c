"""A built-in task: synthetic English acceptability judgements in CoLA's columns.

Sentences come from a template grammar as minimal pairs (:mod:`.grammar`); half are acceptable. The
two splits draw their content words from two lexica without a common word (:mod:`.lexicon`), so a
model cannot answer validation by remembering words. Function words are shared. The task is made to
have something real to train on without a download; its scores compare with nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sparsegrad_cli.data.builtin import acceptability_grammar as grammar
from sparsegrad_cli.data.builtin.acceptability_lexicon import (
    CLOSED_CLASS,
    TRAIN,
    VALIDATION,
    Lexicon,
)
from sparsegrad_cli.errors import DataError

__all__ = [
    "CLOSED_CLASS",
    "LABEL_NAMES",
    "LIMIT",
    "PHENOMENA",
    "Judgement",
    "generate",
    "open_class_words",
    "write_tsv",
]

LABEL_NAMES = ("unacceptable", "acceptable")
PHENOMENA = tuple(grammar.PHENOMENA)
# Every phenomenon has at least this many distinct pairs / len(PHENOMENA) in both lexica.
LIMIT = 20_000
Split = Literal["train", "validation"]


@dataclass(frozen=True)
class Judgement:
    """One row in CoLA's columns; ``source`` is the phenomenon, ``mark`` is ``*`` for label 0."""

    source: str
    label: int
    mark: str
    sentence: str


def generate(split: Split, size: int, seed: int = 0) -> list[Judgement]:
    """``size`` distinct judgements of a split, balanced, in random order.

    The same for equal arguments on every platform; no global random state is read or changed.
    Both sentences of a pair are in it (but for the last of an odd ``size``).

    Raises:
        DataError: ``size`` is below 2 or above ``LIMIT``.
    """
    if not 2 <= size <= LIMIT:
        raise DataError(f"{size} sentences cannot be made: 2 to {LIMIT:,}", where="task")
    rng = random.Random(f"acceptability {split} {seed}")
    maker = grammar.Maker(_lexicon(split), rng)
    rows: list[Judgement] = []
    seen: set[str] = set()
    number = 0
    while len(rows) < size:
        name = PHENOMENA[number % len(PHENOMENA)]
        good, bad = grammar.embed(maker, grammar.PHENOMENA[name](maker))
        pair = grammar.write(good), grammar.write(bad)
        if pair[0] == pair[1] or seen.intersection(pair):
            continue
        number += 1
        seen.update(pair)
        rows.append(Judgement(name, 1, "", pair[0]))
        rows.append(Judgement(name, 0, "*", pair[1]))
    rows = rows[:size]
    rng.shuffle(rows)
    return rows


def _lexicon(split: Split) -> Lexicon:
    return TRAIN if split == "train" else VALIDATION


def open_class_words(split: Split) -> frozenset[str]:
    """Every inflected content word of a split, lower case."""
    return _lexicon(split).words()


def write_tsv(rows: Sequence[Judgement], path: str | Path) -> None:
    """CoLA's TSV layout: no header; source, label, mark, sentence."""
    lines = [f"{row.source}\t{row.label}\t{row.mark}\t{row.sentence}\n" for row in rows]
    Path(path).write_text("".join(lines), encoding="utf-8")
