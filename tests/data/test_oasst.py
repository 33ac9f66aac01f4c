"""OpenAssistant trees: paths against hand-written ones, the best reply, filters."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from support.oasst_samples import (
    EXPECTED,
    all_conversations,
    as_text,
    flat,
    large_tree,
    node,
    read,
    small_tree,
    tree,
    write,
)

from sparsegrad_cli.data.conversation import Conversation, Turn, learnt_turns
from sparsegrad_cli.errors import DataError

# --- paths and shapes of files


@pytest.mark.parametrize("paths", EXPECTED)
@pytest.mark.parametrize(
    "shape", ["trees", "nested messages", "flat", "shuffled", "mixed", "array"]
)
def test_paths_are_the_hand_written_ones(tmp_path: Path, paths: str, shape: str) -> None:
    rows = [*flat(large_tree()), *flat(small_tree())]
    if shape == "shuffled":
        random.Random(5).shuffle(rows)
    file = tmp_path / "x.jsonl"
    shapes: dict[str, list[Any]] = {
        "trees": [tree(large_tree()), tree(small_tree())],
        "nested messages": [large_tree(), small_tree()],
        "mixed": [tree(large_tree()), *flat(small_tree()), *flat(large_tree())],
        "array": [json.dumps([tree(large_tree()), tree(small_tree())])],
    }
    data = read(write(file, *shapes.get(shape, rows)), paths=paths, validation_fraction=0.5)
    assert all_conversations(data) == set(EXPECTED[paths])
    assert data.counts["messages read"] == 14 and data.counts["messages kept"] == 14
    assert data.counts["prompts cut, nothing answers them"] == 3  # p3, p4, p6
    used = {"threads": 11, "best": 6, "replies": 11}[paths]
    assert data.counts["messages in conversations"] == used
    assert data.counts.get("messages off the chosen paths", 0) == 11 - used
    assert data.counts.get("repeated message, read once", 0) == (12 if shape == "mixed" else 0)


@pytest.mark.parametrize("paths", EXPECTED)
def test_conversations_come_in_source_order(tmp_path: Path, paths: str) -> None:
    data = read(write(tmp_path / "x.jsonl", tree(large_tree()), tree(small_tree())), paths=paths)
    part = next(part for part in (data.train, data.validation) if part[0].group == "p1")
    # As written above: depth first, every reply before those that are nested in it.
    assert [as_text(each) for each in part] == [each for each in EXPECTED[paths] if each[0] == "p"]


def test_counts_tell_repeated_turns_from_distinct_ones(tmp_path: Path) -> None:
    data = read(write(tmp_path / "x.jsonl", tree(large_tree()), tree(small_tree())))
    sides = ("training", "validation")
    learnt = sum(data.counts[f"{side} assistant turns learnt"] for side in sides)
    distinct = sum(data.counts[f"{side} assistant turns learnt, distinct"] for side in sides)
    assert (learnt, distinct) == (8, 7)  # a4 is in two threads
    replies = read(tmp_path / "x.jsonl", paths="replies")
    assert sum(replies.counts[f"{side} assistant turns learnt"] for side in sides) == 7


def test_same_text_after_another_prompt_is_distinct() -> None:
    def made(*texts: str) -> Conversation:
        turns = [
            Turn("assistant" if i % 2 else "user", t, bool(i % 2)) for i, t in enumerate(texts)
        ]
        return Conversation(tuple(turns), "g")

    assert learnt_turns([made("p", "yes"), made("q", "yes"), made("p", "yes")]) == (3, 2)


def test_turns_keep_the_text_as_it_stands(tmp_path: Path) -> None:
    text = " \tcafé \u2028 two\r\nlines \U0001f600\n"
    file = write(tmp_path / "x.jsonl", node("p", node("a", text=text)), small_tree())
    turns = [each.turns for each in [*read(file).train, *read(file).validation] if len(each.turns)]
    assert (Turn("user", "p"), Turn("assistant", text, True)) in turns


# --- which reply is best


@pytest.mark.parametrize(
    ("replies", "best"),
    [
        ([{"rank": 1}, {"rank": 0}], 1),
        ([{"rank": None}, {"rank": 3}], 1),  # ranked before unranked
        ([{"rank": 2}, {"rank": 2, "labels": {"quality": {"value": 0.1, "count": 1}}}], 1),
        ([{}, {"labels": {"quality": {"value": 0.7, "count": 3}}}], 1),
        ([{"labels": {"quality": {"value": 0.7}}}, {"labels": {"quality": {"value": 0.6}}}], 0),
        ([{}, {}], 0),  # by the smaller id
        ([{"rank": 0, "deleted": True}, {"rank": 4}], 1),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_the_best_path_takes_the_best_reply(
    tmp_path: Path, replies: list[dict[str, Any]], best: int, turned: bool
) -> None:
    made = [node(f"a{number}", **extra) for number, extra in enumerate(replies)]
    file = write(tmp_path / "x.jsonl", node("p", *(made[::-1] if turned else made)), small_tree())
    assert f"p a{best}*" in all_conversations(read(file, paths="best"))


# --- filters


def filtered(
    folder: Path, *roots: dict[str, Any], **settings: Any
) -> tuple[set[str], dict[str, int]]:
    """Return the conversations of the other trees, and what was dropped."""
    data = read(write(folder / "x.jsonl", *roots, tree(small_tree())), **settings)
    dropped = {
        name.removeprefix("messages dropped: "): count
        for name, count in data.counts.items()
        if name.startswith("messages dropped: ")
    }
    assert data.counts["messages read"] == data.counts["messages kept"] + sum(dropped.values())
    return all_conversations(data) - {"q1 a7*"}, dropped


def test_deleted_and_rejected_messages_drop_all_below_them(tmp_path: Path) -> None:
    root = node(
        "p",
        node("a1", node("p2", node("a2"))),
        node("a3", node("p3", node("a4")), deleted=True),
        node("a5", node("p4", node("a6"), review_result=False)),
        node("a7x", review_result=None, deleted=None),
    )
    found, dropped = filtered(tmp_path, root)
    assert found == {"p a1* p2 a2*", "p a5*", "p a7x*"}
    assert dropped == {"deleted": 1, "rejected by review": 1, "below a dropped message": 3}


def test_languages_filter_messages(tmp_path: Path) -> None:
    root = node(
        "p",
        node("a1", lang="de"),
        node("a2", lang="EN-gb"),
        node("a3", lang=None),
        node("a4", lang="enx"),
    )
    found, dropped = filtered(tmp_path, root, node("r", node("a9"), lang="fr"), languages=("en",))
    assert found == {"p a2*"}
    assert dropped == {
        "filter languages: not in en": 3,
        "filter languages: none given": 1,
        "below a dropped message": 1,
    }
    data = read(tmp_path / "x.jsonl", languages=("en", "pt"))
    assert "no message is left in language 'pt'" in data.notes
    with pytest.raises(DataError, match=r"no conversation is left.*filter languages: not in ger"):
        read(tmp_path / "x.jsonl", languages=("ger",))


def test_max_rank_drops_assistant_replies_without_a_rank(tmp_path: Path) -> None:
    root = node(
        "p",
        node("a1", node("p2", node("a2"), rank=5), rank=0),  # p2 is a prompt, a2 an only reply
        node("a3", rank=1),
        node("a4", node("p3", node("a5")), rank=2),
        node("a6", rank=None),
    )
    found, dropped = filtered(tmp_path, root, max_rank=1)
    assert found == {"p a1* p2 a2*", "p a3*"}
    assert dropped == {
        "filter max_rank: above 1": 1,
        "filter max_rank: not ranked among its siblings": 1,
        "below a dropped message": 2,
    }


def test_a_reply_without_siblings_needs_no_rank(tmp_path: Path) -> None:
    root = node("p", node("a1"), node("a2", deleted=True), node("p2"))
    assert filtered(tmp_path, root, max_rank=0)[0] == {"p a1*"}


@pytest.mark.parametrize(
    "shape",
    [
        lambda value: {"quality": {"value": value, "count": 2}, "spam": {"value": 0, "count": 1}},
        lambda value: {"name": ["spam", "quality"], "value": [0.0, value], "count": [1, 2]},
        lambda value: [{"name": "quality", "value": value, "count": 2}],
    ],
)
def test_min_quality_drops_replies(tmp_path: Path, shape: Any) -> None:
    root = node(
        "p",
        node("a1", labels=shape(0.5)),
        node("a2", labels=shape(0.49)),
        node("a3", labels=shape(None)),
        node("a4", labels=None),
        labels=shape(0.0),
    )
    only = node("q", node("a8", labels=shape(1.0)))
    data = read(write(tmp_path / "x.jsonl", root, only), min_quality=0.5)
    assert all_conversations(data) == {"p a1*", "q a8*"}
    assert data.counts["messages dropped: filter min_quality: below 0.5"] == 1
    assert data.counts["messages dropped: filter min_quality: none given"] == 2


def test_tree_states_filter_trees(tmp_path: Path) -> None:
    low = tree(node("l", node("a1")), tree_state="aborted_low_grade")
    unsaid = tree(node("u", node("a2")), tree_state=None)
    rows = [row | {"tree_state": "halted_by_moderator"} for row in flat(node("h", node("a3")))]
    found, dropped = filtered(tmp_path, low, unsaid, *rows)
    assert found == {"u a2*"}
    assert dropped == {
        "filter tree_states: aborted_low_grade": 1,
        "filter tree_states: halted_by_moderator": 1,
        "below a dropped message": 2,
    }
    found, dropped = filtered(tmp_path, low, unsaid, *rows, tree_states=None)
    assert found == {"l a1*", "u a2*", "h a3*"} and not dropped
