"""Damaged OpenAssistant data: a message is dropped and counted, a file is refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from support.oasst_samples import (
    all_conversations,
    as_text,
    flat,
    node,
    read,
    small_tree,
    tree,
    write,
)

from sparsegrad_cli.errors import DataError


def others() -> list[dict[str, Any]]:
    """Return two valid trees, so that there is always something to split."""
    return [small_tree(), node("q2", node("a8"))]


def survivors(folder: Path, *records: Any, **settings: Any) -> tuple[set[str], dict[str, int]]:
    """Return the conversations of the other trees, and the counts of all faults."""
    data = read(write(folder / "x.jsonl", *records, *others()), **settings)
    prefix = "messages dropped: "
    dropped = {name.removeprefix(prefix): n for name, n in data.counts.items() if prefix in name}
    assert data.counts["messages read"] == data.counts["messages kept"] + sum(dropped.values())
    known = ("trees", "messages", "prompts", "training", "validation")
    noticed = {name: n for name, n in data.counts.items() if name.split()[0] not in known}
    # A note says where damage (not a filter or a deletion) was first met.
    for reason in [*dropped, *noticed]:
        if reason not in ("below a dropped message", "deleted"):
            assert any(reason in note and "x.jsonl" in note for note in data.notes), reason
    return all_conversations(data) - {"q1 a7*", "q2 a8*"}, dropped | noticed


def without(record: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in keys}


# --- one message is damaged


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"text": 5}, "text is missing or not text"),
        ({"text": None}, "text is missing or not text"),
        ({"text": ["x"]}, "text is missing or not text"),
        ({"text": "\ud800 half"}, "text is not valid Unicode"),
        ({"text": " \n\t "}, "empty text"),
        ({"role": "system"}, "role is neither prompter nor assistant"),
        ({"role": None}, "role is neither prompter nor assistant"),
        ({"role": ["assistant"]}, "role is neither prompter nor assistant"),
        ({"role": "prompter"}, "answers a message of its own role"),
        ({"message_id": None}, "no message_id"),
        ({"message_id": ""}, "no message_id"),
        ({"message_id": 17}, "no message_id"),
        ({"message_id": "\udfff"}, "no message_id"),
        ({"parent_id": 3}, "parent_id is not an id"),
        ({"parent_id": "elsewhere"}, "parent_id is not the message above it"),
        ({"message_tree_id": 3}, "message_tree_id is not an id"),
        ({"message_tree_id": "other"}, "in another tree than the message it answers"),
        ({"deleted": "yes"}, "deleted is neither true nor false"),
        ({"review_result": float("nan")}, "review_result is neither true nor false"),
    ],
)
def test_a_damaged_message_drops_all_below_it(
    tmp_path: Path, extra: dict[str, Any], reason: str
) -> None:
    bad = node("a1", node("p2", node("a2")))
    found, wrong = survivors(tmp_path, tree(node("p", bad | extra, node("a3"))))
    assert found == {"p a3*"}
    assert wrong == {reason: 1, "below a dropped message": 2}


@pytest.mark.parametrize("bad", [None, 7, "a reply", ["x"], True])
def test_a_reply_that_is_not_an_object_is_dropped(tmp_path: Path, bad: Any) -> None:
    root = node("p", node("a1"))
    root["replies"].append(bad)
    assert survivors(tmp_path, tree(root)) == ({"p a1*"}, {"not an object": 1})


@pytest.mark.parametrize("bad", [{"0": node("a9")}, "none", 5, False])
def test_replies_that_are_not_a_list_are_dropped(tmp_path: Path, bad: Any) -> None:
    found, wrong = survivors(tmp_path, node("p", node("a1", replies=bad)))
    assert found == {"p a1*"} and wrong == {"replies is not a list": 1}


def test_missing_and_null_replies_are_none(tmp_path: Path) -> None:
    root = node("p", without(node("a1"), "replies"), node("a2", replies=None))
    assert survivors(tmp_path, tree(root)) == ({"p a1*", "p a2*"}, {})


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"rank": "0"}, "rank that is not a whole number"),
        ({"rank": float("nan")}, "rank that is not a whole number"),
        ({"rank": float("inf")}, "rank that is not a whole number"),
        ({"rank": 0.5}, "rank that is not a whole number"),
        ({"rank": True}, "rank that is not a whole number"),
        ({"labels": {"quality": {"value": "good"}}}, "quality that is not a number"),
        ({"labels": {"quality": {"value": float("nan")}}}, "quality that is not a number"),
        ({"labels": "good"}, "quality that is not a number"),
        ({"lang": 3}, "lang that is not text"),
        ({"tree_state": []}, "tree_state that is not text"),
    ],
)
def test_a_damaged_filter_value_counts_as_missing(
    tmp_path: Path, extra: dict[str, Any], reason: str
) -> None:
    root = node("p", node("a1", **extra), node("a2", rank=0))
    found, wrong = survivors(tmp_path, tree(root))
    assert found == {"p a1*", "p a2*"} and wrong == {f"{reason}, read as missing": 1}


@pytest.mark.parametrize(
    "labels", [{}, {"name": "quality"}, {"name": ["quality"], "value": []}, []]
)
def test_labels_without_a_quality(tmp_path: Path, labels: Any) -> None:
    assert survivors(tmp_path, node("p", node("a1", labels=labels))) == ({"p a1*"}, {})


def test_ranks_as_tables_write_them_are_numbers(tmp_path: Path) -> None:
    root = node("p", node("a1", rank=1.0), node("a2", rank=0.0), node("a3", rank=10**400))
    assert survivors(tmp_path, tree(root), paths="best") == ({"p a2*"}, {})


# --- lines and trees


def test_lines_that_are_neither_a_tree_nor_a_message(tmp_path: Path) -> None:
    lines = ["[1, 2]", "7", "null", "NaN", '"text"', '{"prompt": "Hi", "completion": "Ho"}', "{}"]
    found, wrong = survivors(tmp_path, node("p", node("a1")), *lines, "", "   ")
    assert found == {"p a1*"} and wrong == {"neither a tree nor a message": 7}


@pytest.mark.parametrize("prompt", [None, "text", []])
def test_tree_without_a_prompt(tmp_path: Path, prompt: Any) -> None:
    record = {"message_tree_id": "x", "tree_state": "ready_for_export", "prompt": prompt}
    found, wrong = survivors(tmp_path, record, {"message_tree_id": "y"})
    assert not found and wrong == {"tree without a prompt": 2}


def test_tree_whose_root_is_damaged(tmp_path: Path) -> None:
    records = [
        tree(node("a1", node("p1", node("a2")))),
        tree(node("p2", node("a3")), message_tree_id=5),
        tree(node("p3", node("a4"), parent_id="p2")),
    ]
    found, wrong = survivors(tmp_path, *records)
    assert not found
    assert wrong == {
        "tree that begins with the assistant": 1,
        "message_tree_id is not an id": 1,
        "parent_id is not the message above it": 1,
        "below a dropped message": 4,
    }


def test_two_messages_of_one_role_in_a_row_are_dropped(tmp_path: Path) -> None:
    root = node("p", node("p2", node("a1")), node("a2", node("a3"), node("p3", node("a4"))))
    found, wrong = survivors(tmp_path, tree(root))
    assert found == {"p a2* p3 a4*"}
    assert wrong == {"answers a message of its own role": 2, "below a dropped message": 1}


# --- links


def test_messages_without_a_parent_are_dropped(tmp_path: Path) -> None:
    rows = flat(node("gone", node("a1", node("p2", node("a2")))))[1:]
    found, wrong = survivors(tmp_path, *rows)
    assert not found
    assert wrong == {"parent is not in the data": 1, "below a dropped message": 2}


def test_messages_in_a_cycle_are_dropped(tmp_path: Path) -> None:
    def row(name: str, parent: str) -> dict[str, Any]:
        return without(node(name, parent_id=parent), "replies")

    rows = [
        row("p1", "a3"),  # p1 - a1 - p2 - a3 - p1
        row("a1", "p1"),
        row("p2", "a1"),
        row("a3", "p2"),
        row("a4", "p2"),  # hangs on the cycle
        row("p5", "a4"),
        row("a9", "a9"),  # answers itself
        row("p9", "a9"),
    ]
    found, wrong = survivors(tmp_path, *rows)
    assert not found
    assert wrong == {
        "answers itself, directly or through others": 5,
        "below a dropped message": 3,
    }
    assert survivors(tmp_path, *rows[::-1]) == (found, wrong)


def test_a_repeated_message_is_read_once(tmp_path: Path) -> None:
    root = node("p", node("a1", node("p2", node("a2"))))
    found, wrong = survivors(tmp_path, tree(root), *flat(root), root)
    assert found == {"p a1* p2 a2*"} and wrong == {"repeated message, read once": 8}


def test_deleted_in_one_copy_is_deleted(tmp_path: Path) -> None:
    rows = flat(node("p", node("a1"), node("a2")))
    for copies in ([rows[1] | {"deleted": True}, *rows], [*rows, rows[1] | {"deleted": True}]):
        found, wrong = survivors(tmp_path, *copies)
        assert found == {"p a2*"} and wrong == {"deleted": 1, "repeated message, read once": 1}


@pytest.mark.parametrize("extra", [{"text": "other"}, {"role": "prompter"}, {"parent_id": "q1"}])
def test_two_messages_with_one_id_are_both_dropped(tmp_path: Path, extra: dict[str, Any]) -> None:
    rows = flat(node("p", node("a1", node("p2", node("a2"))), node("a3")))
    for order in (1, -1):
        found, wrong = survivors(tmp_path, *[*rows, rows[1] | extra][::order])
        assert found == {"p a3*"}
        assert wrong == {
            "id of two different messages": 1,
            "below a dropped message": 2,
            "repeated message, read once": 1,
        }


# --- depth


def chain(length: int) -> dict[str, Any]:
    made = node(f"c/{'pa'[(length - 1) % 2]}{length - 1}")
    for number in range(length - 2, -1, -1):
        made = node(f"c/{'pa'[number % 2]}{number}", made)
    return made


def nested_json(length: int) -> str:
    """A tree of that depth, written without recursion."""
    heads = [json.dumps(row)[:-1] + ', "replies": [' for row in flat(chain(length))]
    return "".join(heads) + "]}" * length


def test_a_tree_nested_thousands_of_levels_deep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"at most about 1000 levels.*\n.*x\.jsonl:1\n.*parent_id"):
        read(write(tmp_path / "x.jsonl", nested_json(10_000), *others()))


@pytest.mark.parametrize("leaves_first", [False, True])
def test_a_flat_chain_of_ten_thousand_messages_is_read(tmp_path: Path, leaves_first: bool) -> None:
    rows = flat(chain(10_000))
    records = rows[::-1] if leaves_first else rows
    data = read(write(tmp_path / "x.jsonl", *records, *others()))
    longest = max([*data.train, *data.validation], key=lambda each: len(each.turns))
    assert [turn.text for turn in longest.turns] == [row["text"] for row in rows]
    assert sum(turn.learn for turn in longest.turns) == 5000
    assert data.counts["messages kept"] == 10_004


def test_long_chain_reply_by_reply(tmp_path: Path) -> None:
    data = read(write(tmp_path / "x.jsonl", *flat(chain(1000)), *others()), paths="replies")
    every = [*data.train, *data.validation]
    assert len(every) == 502 and {len(each.turns) for each in every} == set(range(2, 1001, 2))
    assert all(sum(turn.learn for turn in each.turns) == 1 for each in every)


def test_dropping_the_top_of_a_long_chain(tmp_path: Path) -> None:
    rows = flat(chain(10_000))
    rows[1]["deleted"] = True
    assert survivors(tmp_path, *rows)[1] == {"deleted": 1, "below a dropped message": 9998}
    rows[1]["parent_id"] = rows[-1]["message_id"]
    rows[1]["deleted"] = False
    assert survivors(tmp_path, *rows)[1] == {"answers itself, directly or through others": 9999}


# --- files that are not what they claim


def packed(text: str) -> bytes:
    return gzip.compress(text.encode(), mtime=0)


LINE = json.dumps(tree(node("p", node("a1")))) + "\n"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.jsonl", b"", r"holds no records\nwhere: .*x\.jsonl"),
        ("x.jsonl", b"\n \r\n", "holds no records"),
        ("x.jsonl", b"\xef\xbb\xbf", "holds no records"),
        ("x.jsonl.gz", b"", "holds no records"),
        ("x.jsonl.gz", packed(""), "holds no records"),
        ("x.jsonl", LINE.encode() + b'{"message_id": ', r"not JSON.*\nwhere: .*x\.jsonl:2"),
        ("x.jsonl", LINE.encode() + b"\n\nnot json\n", r"not JSON.*\nwhere: .*x\.jsonl:4"),
        ("x.jsonl", LINE.encode() + b'{"a": "\xff"}\n', r"not UTF-8.*0xff.*\nwhere: .*x\.jsonl:2"),
        ("x.jsonl", b'{"rank": ' + b"9" * 5000 + b"}", r"none of the 1 records is an OpenAss"),
        ("x.jsonl", b"[" * 5000, r"at most about 1000 levels.*\nwhere: .*x\.jsonl"),
        ("x.jsonl", b'{"replies": [' * 5000, r"at most about 1000 levels.*\nwhere: .*x\.jsonl"),
        ("x.jsonl.gz", packed(LINE * 50)[:-30], r"cut off before its end\nwhere: .*x\.jsonl\.gz"),
        ("x.jsonl.gz", packed(LINE)[:20] + b"\0" * 90, r"gzip file is damaged"),
        ("x.jsonl.gz", packed(LINE) + b"trailing", r"gzip file is damaged"),
        ("x.jsonl.gz", b"version https://git-lfs.github.com/spec/v1\n", r"not gzip.*\n.*\n.*LFS"),
        ("x.json", b'[{"message_id": "a"},\n}]', r"not JSON.*\nwhere: .*x\.json:2"),
        ("x.jsonl", b'{"text": "a", "label": 1}\n', r"none of the 1 records is an OpenAss"),
        ("x.jsonl", b"[]\n", "holds no records"),
        ("x.jsonl", b"PK\x03\x04\x99\x99", r"zip file is damaged.*\nwhere: .*x\.jsonl"),
        ("x.parquet", b"PAR1", r"Parquet file cannot be read.*\nwhere: .*x\.parquet"),
    ],
)
def test_a_damaged_file_is_refused_with_its_name(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def test_data_without_a_conversation_is_refused_with_reasons_and_places(tmp_path: Path) -> None:
    rows = [node("p1", node("a1", text="")), node("p2", node("a2", deleted=True)), node("p3")]
    with pytest.raises(DataError) as caught:
        read(write(tmp_path / "x.jsonl", *rows))
    text = str(caught.value)
    assert "no conversation is left of 5 messages" in text
    assert "1 empty text (first: " in text and "x.jsonl:1)" in text and "1 deleted" in text


def test_places_of_records_in_an_array(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text(json.dumps([small_tree(), 5, node("p", node("a1"))], indent=1))
    data = read(file)
    assert any("x.json, row 2" in note for note in data.notes)
    assert {as_text(each) for each in [*data.train, *data.validation]} == {"q1 a7*", "p a1*"}
