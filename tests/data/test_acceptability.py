"""The built-in acceptability task: columns, balance, disjoint words, determinism."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import astuple
from pathlib import Path

import pytest
from support.task_data import load_task

from sparsegrad_cli.data.builtin.acceptability import LIMIT, PHENOMENA, generate
from sparsegrad_cli.data.builtin.acceptability_phrases import LEXICA, Lexicon, PhraseMaker
from sparsegrad_cli.data.glue import load_local_glue
from sparsegrad_cli.errors import DataError

# Determiners, pronouns, auxiliaries, prepositions, conjunctions, negation and degree words, which
# both splits use.
FUNCTION_WORDS = frozenset(
    """
    a an the this that these those some no every each many much several few all both
    i he she it we they him her us them himself herself itself themselves ourselves
    nobody everybody somebody who what which whom whose
    is are was were be been being has have had do does did will would can could may must should
    not never ever any to of in on at by with near behind beside from for about under after before
    during and or but than more as very quite because when while there
    """.split()  # noqa: SIM905
)


def content_words(lexicon: Lexicon) -> set[str]:
    nouns = {form for group in lexicon.nouns.values() for noun in group for form in astuple(noun)}
    verbs = {form for group in lexicon.verbs.values() for verb in group for form in astuple(verb)}
    adjectives = {form for pair in lexicon.adjectives for form in pair}
    words = {word.lower() for group in lexicon.words.values() for word in group}
    return nouns | verbs | adjectives | words


def tokens(sentence: str) -> list[str]:
    return re.findall(r"[a-z]+", sentence.lower())


@pytest.mark.parametrize(("split", "size"), [("train", 4000), ("validation", 1000)])
def test_rows_are_complete_balanced_and_distinct(split: str, size: int) -> None:
    rows = generate(split, size)  # type: ignore[arg-type]
    assert len(rows) == size
    assert Counter(row.label for row in rows) == {0: size // 2, 1: size // 2}
    assert all((row.mark == "*") == (row.label == 0) for row in rows)
    assert len({row.sentence for row in rows}) == size
    assert {row.source for row in rows} == set(PHENOMENA) and len(PHENOMENA) >= 10
    assert all(re.fullmatch(r"[A-Z][A-Za-z ]*[.?]", row.sentence) for row in rows)


def test_splits_share_no_content_word() -> None:
    train, validation = map(content_words, LEXICA.values())
    assert not train & validation
    assert not (train | validation) & FUNCTION_WORDS


@pytest.mark.parametrize("split", ["train", "validation"])
def test_every_word_is_of_the_split_or_a_function_word(split: str) -> None:
    allowed = content_words(LEXICA[split]) | FUNCTION_WORDS
    used = {word for row in generate(split, 4000) for word in tokens(row.sentence)}  # type: ignore[arg-type]
    assert used <= allowed, sorted(used - allowed)


def test_equal_arguments_give_equal_results_and_global_state_is_unchanged() -> None:
    state = random.getstate()
    one, two = generate("train", 500, seed=3), generate("train", 500, seed=3)
    assert random.getstate() == state
    assert one == two
    assert one != generate("train", 500, seed=4)
    assert [row.source for row in generate("validation", 8)].count("agreement") == 2


def test_the_generated_data_is_pinned() -> None:
    # A change of the built-in task would make its published scores incomparable.
    pinned = "c3d613097645a997759e766c2460c6e87d2c1c6c7a1c1ecc6afeea6b3e0ee725"
    assert load_task("builtin:acceptability").data_hash == pinned


@pytest.mark.parametrize("name", PHENOMENA)
@pytest.mark.parametrize("split", LEXICA)
def test_pairs_are_minimal(name: str, split: str) -> None:
    maker = PhraseMaker(LEXICA[split], random.Random(1))
    for _ in range(200):
        good, bad = PHENOMENA[name](maker)
        assert good != bad
        changed = sum((Counter(good) - Counter(bad)).values())
        changed += sum((Counter(bad) - Counter(good)).values())
        # One word for another, a word more, an object more, or the same words in another order.
        assert changed <= 4


@pytest.mark.parametrize("size", [1, 0, -5, LIMIT + 1])
def test_sizes_out_of_range_are_refused(size: int) -> None:
    with pytest.raises(DataError, match="cannot be made"):
        generate("train", size)


def test_limit_can_be_reached_in_both_splits() -> None:
    for split in ("train", "validation"):
        assert len(generate(split, LIMIT)) == LIMIT


def test_tsv_is_read_as_cola(tmp_path: Path) -> None:
    folder = tmp_path / "CoLA"
    folder.mkdir()
    train, dev = generate("train", 60), generate("validation", 20)
    for name, rows in (("train", train), ("dev", dev)):
        lines = [f"{row.source}\t{row.label}\t{row.mark}\t{row.sentence}\n" for row in rows]
        (folder / f"{name}.tsv").write_text("".join(lines))
    raw = load_local_glue("cola", tmp_path)
    assert list(raw.train.text) == [row.sentence for row in train]
    assert list(raw.train.label) == [row.label for row in train]
