"""The split into training and validation trees, limits, and the hash of the data."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from support.oasst_samples import (
    all_conversations,
    as_text,
    flat,
    groups_by_split,
    node,
    read,
    write,
)
from support.task_data import load_chat

from sparsegrad_cli.data.conversation import Conversation, RawChat, Turn, finish, split_position
from sparsegrad_cli.errors import DataError, UsageError
from sparsegrad_cli.recipe.task_section import TaskSection

# --- the split


def forest(folder: Path, count: int) -> Path:
    roots = [node(f"t{i}/p", node(f"t{i}/a1"), node(f"t{i}/a2")) for i in range(count)]
    return write(folder / f"{count}.jsonl", *roots)


def test_no_tree_is_on_both_sides_and_every_conversation_on_one(tmp_path: Path) -> None:
    data = read(forest(tmp_path, 300), validation_fraction=0.2)
    train, validation = groups_by_split(data)
    assert not train & validation and len(train) + len(validation) == 300
    assert len(all_conversations(data)) == 600
    assert 30 < len(validation) < 90  # 60 expected, standard deviation 7
    assert data.counts["training trees"] == len(train)
    assert validation == {f"t{i}/p" for i in range(300) if split_position(f"t{i}/p") < 0.2}


def test_added_trees_do_not_move_others(tmp_path: Path) -> None:
    few, many = read(forest(tmp_path, 60)), read(forest(tmp_path, 200))
    assert groups_by_split(few)[1] == groups_by_split(many)[1] & {f"t{i}/p" for i in range(60)}


def test_larger_fraction_holds_out_the_same_and_more(tmp_path: Path) -> None:
    file = forest(tmp_path, 200)
    small, large = (groups_by_split(read(file, validation_fraction=f))[1] for f in (0.1, 0.3))
    assert small < large


def test_split_does_not_depend_on_order_or_shape_or_filter(tmp_path: Path) -> None:
    file = forest(tmp_path, 100)
    lines = file.read_text().splitlines()
    rows = [row for line in lines for row in flat(json.loads(line))]
    random.Random(1).shuffle(rows)
    one, other = read(file), read(write(tmp_path / "flat.jsonl", *rows))
    assert groups_by_split(one) == groups_by_split(other) and all_conversations(
        one
    ) == all_conversations(other)
    kept = groups_by_split(read(write(tmp_path / "half.jsonl", *lines[::2])))
    assert all(part <= whole for part, whole in zip(kept, groups_by_split(one), strict=True))


def test_position_is_pinned() -> None:
    # sha256("validation\nabc"), first 8 bytes over 2^64: a change would move everybody's split.
    assert split_position("abc") == pytest.approx(0.445165039965157, abs=1e-15)


def test_too_few_trees_to_hit_the_fraction(tmp_path: Path) -> None:
    data = read(forest(tmp_path, 3), validation_fraction=0.001)
    assert len(groups_by_split(data)[1]) == 1 and "would have been empty" in data.notes[-1]
    assert groups_by_split(data)[1] == {min((f"t{i}/p" for i in range(3)), key=split_position)}
    data = read(forest(tmp_path, 3), validation_fraction=0.999)
    assert len(groups_by_split(data)[0]) == 1 and "training would have been empty" in data.notes[-1]
    with pytest.raises(DataError, match=r"Expected at least two trees to split .*, got one"):
        read(forest(tmp_path, 1))


def test_the_split_of_the_source_is_used_on_request(tmp_path: Path) -> None:
    # A message listed in the other file than its root follows the root.
    write(tmp_path / "train.jsonl", node("p1", node("a1")), *flat(node("q", node("a2")))[1:])
    write(tmp_path / "validation.jsonl", *flat(node("q", node("a2")))[:1])
    data = read(tmp_path, split="source")
    assert [as_text(each) for each in data.train] == ["p1 a1*"]
    assert [as_text(each) for each in data.validation] == ["q a2*"]
    assert all_conversations(read(tmp_path)) == {"p1 a1*", "q a2*"}  # merged
    with pytest.raises(UsageError, match="not split into training and validation"):
        read(tmp_path / "train.jsonl", split="source")


# --- limits and hash


def test_limits_take_the_first_conversations(tmp_path: Path) -> None:
    file = forest(tmp_path, 100)
    whole = read(file)
    part = load_chat("oasst", path=file, train_limit=7, eval_limit=2)
    assert part.train == whole.train[:7] and part.validation == whole.validation[:2]
    assert part.counts["training conversations"] == 7 and part.counts["training trees"] == 4
    assert f"training uses the first 7 of {len(whole.train)} conversations" in part.notes
    assert part.data_hash != whole.data_hash


def test_the_hash_covers_everything_that_is_learnt() -> None:
    def hashed(train: list[list[Turn]], validation: list[list[Turn]]) -> str:
        def conversations(part: list[list[Turn]]) -> list[Conversation]:
            return [Conversation(tuple(turns), "g") for turns in part]

        raw = RawChat(conversations(train), conversations(validation), "trees", {})
        return finish(raw, TaskSection(name="oasst")).data_hash

    p, q = Turn("user", "p"), Turn("user", "q")
    a, b = Turn("assistant", "a", True), Turn("assistant", "b", True)
    one, two = [p, a], [q, b]
    hashes = [
        hashed([one, two], [one]),
        hashed([two, one], [one]),  # order
        hashed([one, two], [two]),  # validation
        hashed([one], [two, one]),  # the split
        hashed([[p, a, q, b], one], [one]),  # where a conversation ends ...
        hashed([one, [q, b, p, a]], [one]),  # ... of
        hashed([one, two, one], [one]),  # ... these three
        hashed([one, [q, Turn("assistant", "b!", True)]], [one]),  # a text
        hashed([one, [Turn("system", "q"), b]], [one]),  # a role
        hashed([[p, Turn("assistant", "a"), q, b]], [one]),  # what is learnt
        hashed([one, [Turn("user", "qb"), Turn("assistant", "", True)]], [one]),  # an end
    ]
    assert len(set(hashes)) == len(hashes)
    assert hashed([one, two], [one]) == hashes[0] and len(hashes[0]) == 64
