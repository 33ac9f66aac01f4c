"""The built-in conversations: shape, determinism, disjoint fillers, the same reader as exports."""

from __future__ import annotations

import random
import re
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from support.oasst_samples import flat, read, write
from support.task_data import load_chat

from sparsegrad_cli.data.builtin.dialogue_scenes import WORDS
from sparsegrad_cli.data.builtin.dialogues import LIMIT, SIZES, Split, generate
from sparsegrad_cli.errors import DataError

GOOD = re.compile(r"Short answer: [^\n]+\.\n\n1\. [^\n]+\n2\. [^\n]+\n3\. [^\n]+\n\nNext: [^\n]+\.")
BRIEF = re.compile(r"In one line: [^\n]+\.")


@pytest.mark.parametrize("split", SIZES)
def test_trees_are_complete_and_their_prompts_distinct(split: Split) -> None:
    trees = generate(split, SIZES[split])
    assert len({tree["prompt"]["text"] for tree in trees}) == len(trees) == SIZES[split]
    names = [row["message_id"] for tree in trees for row in flat(tree["prompt"])]
    assert len(set(names)) == len(names)
    for tree in trees:
        assert tree["message_tree_id"] == tree["prompt"]["message_id"]
        first = tree["prompt"]["replies"]
        assert sorted(reply["rank"] for reply in first) == list(range(len(first)))
        assert len({reply["text"] for reply in first}) == len(first) >= 2
        best = min(first, key=lambda reply: reply["rank"])
        assert GOOD.fullmatch(best["text"])
        assert not any(GOOD.fullmatch(reply["text"]) for reply in first if reply is not best)
        assert best["labels"]["quality"]["value"] == max(
            reply["labels"]["quality"]["value"] for reply in first
        )


def test_splits_share_no_filler() -> None:
    train, validation = (
        set(" ".join(chain.from_iterable(groups.values())).lower().split()) - {"a", "an", "the"}
        for groups in (WORDS["train"], WORDS["validation"])
    )
    assert not train & validation
    # The templates, which both splits use, have none of these words either.
    assert not spoken_words("train") & validation
    assert not spoken_words("validation") & train


def spoken_words(split: Split) -> set[str]:
    texts = [row["text"] for tree in generate(split, 900) for row in flat(tree["prompt"])]
    return {word for text in texts for word in re.findall(r"[a-z]+", text.lower())}


@pytest.mark.parametrize("split", SIZES)
def test_sums_and_times_in_answers_are_right(split: Split) -> None:
    checked = Counter[str]()
    for tree in generate(split, 400):
        prompt = tree["prompt"]["text"]
        text = min(tree["prompt"]["replies"], key=lambda reply: reply["rank"])["text"]
        for a, b, c in re.findall(r"(\d+) times (\d+) is (\d+)", text):
            assert int(a) * int(b) == int(c)
            checked["times"] += 1
        if match := re.search(
            r"(\d+) minutes.*(?:start at|from) (\d+):00|from (\d+):00, (\d+)", prompt
        ):
            minutes, hour = (match[1] or match[4], match[2] or match[3])
            end = int(hour) * 60 + 3 * int(minutes)
            assert f"done at {end // 60}:{end % 60:02d}." in text
            checked["clock"] += 1
        if match := re.search(r"(?:order|Z): (.*?)\.?$", prompt):
            assert f"Short answer: {', '.join(sorted(match[1].split(', ')))}." in text
            checked["order"] += 1
    assert set(checked) == {"times", "clock", "order"} and min(checked.values()) >= 50


def test_equal_arguments_give_equal_results_and_global_state_is_unchanged() -> None:
    state = random.getstate()
    one = generate("train", 50, seed=3)
    assert random.getstate() == state
    assert one == generate("train", 80, seed=3)[:50] and one != generate("train", 50, seed=4)


def test_the_generated_data_is_pinned() -> None:
    # A change of the built-in task would make its published losses incomparable.
    pinned = "05544b60c0f167857e86d1d886d11f12c1a6e9c6e1fad0a2fabd0c521cc0ae9e"
    assert load_chat("builtin:dialogues").data_hash == pinned


@pytest.mark.parametrize("size", [0, -1, LIMIT + 1])
def test_sizes_out_of_range_are_refused(size: int) -> None:
    with pytest.raises(DataError, match="cannot be made"):
        generate("train", size)


@pytest.mark.parametrize("split", SIZES)
def test_limit_can_be_reached(split: Split) -> None:
    assert len(generate(split, LIMIT)) == LIMIT


def test_best_paths_have_the_shape_throughout() -> None:
    data = load_chat("builtin:dialogues", paths="best")
    assert (len(data.train), len(data.validation)) == (SIZES["train"], SIZES["validation"])
    for each in [*data.train, *data.validation]:
        for turn in each.turns:
            if turn.role == "assistant":
                assert GOOD.fullmatch(turn.text) or BRIEF.fullmatch(turn.text)
    assert {len(each.turns) for each in data.train} == {2, 4}


def test_generated_split_is_kept_and_filters_work() -> None:
    data = load_chat("builtin:dialogues")
    assert all(each.group.startswith("dialogues-train-") for each in data.train)
    assert all(each.group.startswith("dialogues-validation-") for each in data.validation)
    assert (
        data.counts["training assistant turns learnt"]
        > (data.counts["training assistant turns learnt, distinct"])
    )
    by_rank: dict[str, Any] = {"max_rank": 0, "paths": "replies"}
    by_quality: dict[str, Any] = {"min_quality": 0.9, "paths": "replies"}
    one, other = (load_chat("builtin:dialogues", **settings) for settings in (by_rank, by_quality))
    assert one.counts["training conversations"] < data.counts["training conversations"]
    assert all(not turn.text.startswith("Well,") for each in one.train for turn in each.turns[1:2])
    assert set(map(spoken_last, other.train)) <= set(map(spoken_last, one.train))


def spoken_last(conversation: Any) -> tuple[str, ...]:
    return tuple(turn.text for turn in conversation.turns)


def test_generated_trees_written_to_a_file_read_the_same(tmp_path: Path) -> None:
    for split, size in SIZES.items():
        write(tmp_path / f"{split}.jsonl", *generate(split, size))
    data = read(tmp_path, split="source")
    assert data.data_hash == load_chat("builtin:dialogues").data_hash
