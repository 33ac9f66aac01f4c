"""``builtin:acceptability``: synthetic English acceptability judgements, as in CoLA.

Sentences come from a template grammar (:mod:`.acceptability_grammar`) as minimal pairs; half of
them are acceptable. The two splits draw their content words from lexica without a common word
(:mod:`.acceptability_lexicon`), so a model cannot answer validation by remembering words. The task
allows real training without a download; its scores compare with nothing else.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from sparsegrad_cli.data.builtin import acceptability_grammar as grammar
from sparsegrad_cli.data.builtin.acceptability_lexicon import TRAIN, VALIDATION, PhraseMaker
from sparsegrad_cli.errors import DataError

LABEL_NAMES = ("unacceptable", "acceptable")
PHENOMENA = tuple(grammar.PHENOMENA)
# In both lexica, every phenomenon has at least LIMIT / len(PHENOMENA) distinct pairs.
LIMIT = 20_000
Split = Literal["train", "validation"]


@dataclass(frozen=True)
class Judgement:
    """One row in CoLA's columns: phenomenon, label, ``*`` for label 0, sentence."""

    source: str
    label: int
    mark: str
    sentence: str


def generate(split: Split, size: int, seed: int = 0) -> list[Judgement]:
    """Return ``size`` distinct judgements of a split, balanced, in random order.

    Equal arguments give equal results on every platform. Both sentences of a pair are included
    (except for the last pair of an odd ``size``).

    Raises:
        DataError: ``size`` is below 2 or above ``LIMIT``.
    """
    if not 2 <= size <= LIMIT:
        raise DataError(f"{size} sentences cannot be made: 2 to {LIMIT:,}", where="task")
    rng = random.Random(f"acceptability {split} {seed}")
    maker = PhraseMaker(TRAIN if split == "train" else VALIDATION, rng)
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
