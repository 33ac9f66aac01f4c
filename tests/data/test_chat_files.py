"""Chat data in files: every kind of columns, the split, damaged rows and files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from support.oasst_samples import as_text, read, write
from support.task_data import load_chat

from sparsegrad_cli.data.conversation import ChatData, Conversation, split_position
from sparsegrad_cli.errors import DataError, DownloadError, UsageError


def said(*texts: str, roles: str = "ua") -> list[dict[str, Any]]:
    """Messages by turns, the user first."""
    names = {"u": "user", "a": "assistant", "s": "system"}
    return [
        {"role": names[roles[at % len(roles)]], "content": text} for at, text in enumerate(texts)
    ]


def beside() -> list[dict[str, Any]]:
    """Return two valid rows, so that there is always something to split."""
    return [{"messages": said("u8", "a8")}, {"messages": said("u9", "a9")}]


def every(data: ChatData) -> list[Conversation]:
    return [*data.train, *data.validation]


def found(folder: Path, *rows: Any, **settings: Any) -> tuple[set[str], dict[str, int]]:
    """Return the conversations of the other rows, and what was dropped or cut."""
    data = read(write(folder / "x.jsonl", *rows, *beside()), "chat", **settings)
    counts = {
        name.removeprefix("rows dropped: "): count
        for name, count in data.counts.items()
        if "dropped" in name or "cut" in name
    }
    dropped = sum(n for name, n in data.counts.items() if "dropped" in name)
    assert data.counts["rows read"] == data.counts["rows kept"] + dropped
    assert len(every(data)) == data.counts["rows kept"]
    return {as_text(each) for each in every(data)} - {"u8 a8*", "u9 a9*"}, counts


# --- kinds


def test_messages_learn_every_turn_of_the_assistant(tmp_path: Path) -> None:
    rows = [
        {"messages": said("s1", "u1", "a1", roles="sua")},
        {"messages": said("u2", "a2", "u3", "a3"), "source": "x", "messages_id": 3},
    ]
    assert found(tmp_path, *rows) == ({"s1 u1 a1*", "u2 a2* u3 a3*"}, {})


def test_sharegpt_rows_are_read(tmp_path: Path) -> None:
    turns = [("system", "s"), ("human", "u1"), ("gpt", "a1"), ("human", "u2"), ("gpt", "a2")]
    row = {"id": "1", "conversations": [{"from": who, "value": text} for who, text in turns]}
    other = {"id": "2", "conversations": [{"from": "human", "value": "u3"}, *said("a3", roles="a")]}
    data = read(write(tmp_path / "x.jsonl", row, other), "chat")
    assert {as_text(each) for each in every(data)} == {"s u1 a1* u2 a2*", "u3 a3*"}


def test_prompt_and_completion(tmp_path: Path) -> None:
    rows = [
        {"prompt": "u1", "completion": "a1"},
        {"prompt": said("s", "u2", "a2", "u3", roles="suau"), "completion": said("a3", roles="a")},
        {"prompt": "u4", "completion": said("a4", "u5", "a5", roles="aua")},
    ]
    data = read(write(tmp_path / "x.jsonl", *rows), "chat")
    assert {as_text(each) for each in every(data)} == {
        "u1 a1*",
        "s u2 a2 u3 a3*",  # what the prompt holds of the assistant is not learnt
        "u4 a4* u5 a5*",
    }


def test_instruction_input_output(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Hi", "input": "", "output": "Ho", "system": "Be kind."},
        {"instruction": "Hu", "output": "Ha"},
    ]
    data = read(write(tmp_path / "x.jsonl", *rows), "chat")
    assert {as_text(each) for each in every(data)} == {
        "Add.\n\n1 2 3*",
        "Be kind. Hi Ho*",
        "Hu Ha*",
    }


def test_text_parts_are_joined_and_others_refused(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    row = {"messages": [*said("u"), {"role": "assistant", "content": parts}]}
    assert found(tmp_path, row) == ({"u ab*"}, {})
    row["messages"][0]["content"] = [{"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(DataError, match=r"part of type 'image_url': only text.*\n.*x\.jsonl:2"):
        found(tmp_path, *beside()[:1], row)


def test_a_setting_chooses_between_two_kinds_of_columns(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"u{i}", "completion": f"a{i}", "messages": said(f"m{i}", f"n{i}")}
        for i in range(2)
    ]
    file = write(tmp_path / "x.jsonl", *rows)
    with pytest.raises(UsageError, match="has messages as well as prompt and completion"):
        read(file, "chat")
    one = read(file, "chat", kind="prompt_completion")
    assert {as_text(each) for each in every(one)} == {"u0 a0*", "u1 a1*"}
    for settings in ({"kind": "messages"}, {"column": "messages"}):
        other = read(file, "chat", **settings)
        assert {as_text(each) for each in every(other)} == {"m0 n0*", "m1 n1*"}


def test_a_setting_names_the_column_of_messages(tmp_path: Path) -> None:
    rows = [{"dialog": said(f"u{i}", f"a{i}")} for i in range(2)]
    file = write(tmp_path / "x.jsonl", *rows)
    assert {as_text(each) for each in every(read(file, "chat", column="dialog"))} == {
        "u0 a0*",
        "u1 a1*",
    }
    for settings, message in (
        ({}, r"no conversation among the columns of .*x\.jsonl: dialog"),
        ({"column": "dialogs"}, "did you mean dialog"),
        ({"column": "dialog", "kind": "instruction"}, "kind instruction has its own columns"),
        ({"kind": "messages"}, "no conversation among the columns"),
    ):
        with pytest.raises(UsageError, match=message):
            read(file, "chat", **settings)


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "json", "json.gz", "parquet", "txt"])
def test_all_formats_give_the_same_rows(tmp_path: Path, suffix: str) -> None:
    from datasets import Dataset

    rows = [{"messages": said(f"u{i}", f"a\u2028{i}")} for i in range(30)]
    file = tmp_path / f"x.{suffix}"
    lines = "\ufeff" + "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    text = json.dumps(rows, indent=1) if "json" in suffix and "jsonl" not in suffix else lines
    if suffix == "parquet":
        Dataset.from_list(rows).to_parquet(file)
    else:
        file.write_bytes(gzip.compress(text.encode()) if "gz" in suffix else text.encode())
    data = read(file, "chat")
    reference = read(write(tmp_path / "reference.jsonl", *rows), "chat")
    assert data.data_hash == reference.data_hash and len(every(data)) == 30


def test_prompts_are_read_from_csv(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_text('prompt,completion\nu1,"a,1"\nu2,"a\n2"\n')
    assert {as_text(each) for each in every(read(file, "chat"))} == {"u1 a,1*", "u2 a\n2*"}


# --- damage


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        (None, "the turns are missing or not a list"),
        ("hi", "the turns are missing or not a list"),
        ([], "no turn of the assistant"),
        (said("u"), "no turn of the assistant"),
        (["hi"], "a turn is not an object"),
        ([{}], "a role that is not system, user, assistant or tool"),
        (
            [{"role": "critic", "content": "x"}],
            "a role that is not system, user, assistant or tool",
        ),
        ([{"role": 5, "content": "x"}], "a role that is not system, user, assistant or tool"),
        ([*said("u"), {"role": "assistant"}], "a turn's text is missing or not text"),
        ([*said("u"), {"role": "assistant", "content": 3}], "a turn's text is missing or not text"),
        ([*said("u"), {"role": "assistant", "content": ["a"]}], "a part of a turn is not text"),
        (said("u", "a", "u", " "), "a turn is empty"),
        (said("u", "\ud83d"), "text is not valid Unicode"),
        (said("a", "u", "a", roles="aua"), "begins with the assistant"),
        (said("u", "u", "a", roles="uua"), "two turns of one role in a row"),
        (said("u", "a", "a", roles="uaa"), "two turns of one role in a row"),
        (said("u", "a", "s", "u", "a", roles="uasua"), "a system turn that is not the first"),
        (
            [*said("u"), {"role": "tool", "content": "x"}, *said("a", roles="a")],
            "a tool's turn that follows no turn of the assistant",
        ),
        (
            [*said("u"), {"role": "assistant", "content": "x", "tool_calls": "clock"}],
            "tool_calls is neither a list nor JSON",
        ),
        (
            [*said("u"), {"role": "assistant", "content": "x", "tool_calls": ["5"]}],
            "tool_calls is not a list of objects",
        ),
        (
            [*said("u"), {"role": "assistant", "content": "x", "reasoning_content": 5}],
            "reasoning is not text",
        ),
        (
            [*said("u"), {"role": "assistant", "content": "x", "weight": 0}],
            "every answer has a loss weight of 0",
        ),
    ],
)
def test_damaged_row_is_dropped_and_counted(tmp_path: Path, turns: Any, reason: str) -> None:
    assert found(tmp_path, {"messages": turns}, {"messages": turns}) == (set(), {reason: 2})
    data = read(tmp_path / "x.jsonl", "chat")
    assert f"2 x {reason}; first: {tmp_path / 'x.jsonl'}:1" in data.notes


def test_turns_that_are_cut_are_counted(tmp_path: Path) -> None:
    rows = [
        {"messages": said("u1", "a1", "u2")},
        {"messages": said(" ", "u3", "a3", roles="sua")},
    ]
    assert found(tmp_path, *rows) == (
        {"u1 a1*", "u3 a3*"},
        {"turns cut, no learnt one follows them": 1, "empty system turns cut": 1},
    )


def test_a_second_system_turn_and_a_system_without_text(tmp_path: Path) -> None:
    row = {"messages": said("s", "u", "a", roles="sua")}
    assert found(tmp_path, row | {"system": "t"})[1] == {"a system turn that is not the first": 1}
    assert found(tmp_path, row | {"system": 5})[1] == {"system is not text": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no rows"),
        ("7\n", r"expected an object.*int\nwhere: .*x\.jsonl:1"),
        ('{"messages": []}\n{', r"not JSON.*\nwhere: .*x\.jsonl:2"),
        ('{"messages": []}\n', r"no conversation is left of 1 rows: 1 no turn of the assistant"),
        ("[" * 9000, "at most about 1000 levels deep"),
        ('{"prompt": "same", "completion": "a"}\n' * 9, "Expected at least two opening prompts"),
    ],
)
def test_a_damaged_file_is_refused_with_its_name(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "x.jsonl", "chat")


def test_a_deeply_nested_row_is_dropped_or_refused_with_its_line(tmp_path: Path) -> None:
    deep = '{"messages": ' + "[" * 500 + "]" * 500 + "}"
    assert found(tmp_path, deep) == (set(), {"a turn is not an object": 1})
    deeper = '{"messages": ' + "[" * 9000 + "]" * 9000 + "}"
    with pytest.raises(DataError, match=r"at most about 1000 levels deep.*\n.*x\.jsonl:1"):
        found(tmp_path, deeper)


# --- the split


def test_rows_with_one_opening_prompt_stay_in_one_split(tmp_path: Path) -> None:
    rows = [{"prompt": f"u{i // 3}", "completion": f"a{i}"} for i in range(300)]
    few = read(write(tmp_path / "few.jsonl", *rows[:150]), "chat", validation_fraction=0.2)
    many = read(write(tmp_path / "many.jsonl", *rows[::-1]), "chat", validation_fraction=0.2)
    groups = [{each.group for each in part} for part in (many.train, many.validation)]
    assert not groups[0] & groups[1] and len(groups[0] | groups[1]) == 100
    assert groups[1] == {group for group in groups[0] | groups[1] if split_position(group) < 0.2}
    assert {each.group for each in few.validation} < groups[1]
    prompts = [{each.turns[0].text for each in part} for part in (many.train, many.validation)]
    assert not prompts[0] & prompts[1] and len(many.validation) == 3 * len(groups[1])
    assert "chosen by a hash" in many.notes[-1] and "opening prompts" in many.notes[-1]


def test_the_split_of_a_folder_is_kept(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", *({"messages": said(f"u{i}", "a")} for i in range(5)))
    dev = tmp_path / "dev.json.gz"
    dev.write_bytes(gzip.compress(json.dumps([{"messages": said(u, "b")} for u in "xy"]).encode()))
    data = read(tmp_path, "chat")
    assert [as_text(each) for each in data.validation] == ["x b*", "y b*"]
    assert [as_text(each) for each in data.train] == [f"u{i} a*" for i in range(5)]
    assert data.notes == [] and data.counts["validation rows"] == 2
    merged = read(tmp_path, "chat", split="hash", validation_fraction=0.5)
    assert len(every(merged)) == 7 and "opening prompts" in merged.notes[-1]
    write(tmp_path / "train.jsonl", {"messages": said("x", "a")})
    assert read(tmp_path, "chat").notes == [
        "1 validation rows open with a prompt that training has too"
    ]
    dev.unlink()
    with pytest.raises(UsageError, match="no validation part"):
        read(tmp_path, "chat", split="source")
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(DataError, match=r"no training file\n.*\n.*train\.jsonl.*\.gz"):
        read(tmp_path, "chat")


def test_a_split_whose_rows_are_all_damaged_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", {"messages": said("u", "a")})
    write(tmp_path / "validation.jsonl", {"messages": said("u")})
    with pytest.raises(DataError, match="no conversation for validation"):
        read(tmp_path, "chat")


# --- the hub


def fill_cache(folder: Path, splits: dict[str, list[dict[str, Any]]]) -> None:
    """Write the cache that the hub's library leaves after a download of some/chats."""
    from datasets import DatasetInfo, Features, List, SplitDict, SplitInfo, Value
    from datasets.arrow_writer import ArrowWriter

    turn = {"role": Value("string"), "content": Value("string")}
    features = Features({"prompt": Value("string"), "talk": List(turn)})
    folder = folder / "some___chats" / "default" / "0.0.0" / "abc"
    folder.mkdir(parents=True)
    infos = SplitDict()
    for split, rows in splits.items():
        writer = ArrowWriter(path=str(folder / f"chats-{split}.arrow"), features=features)
        for row in rows:
            writer.write(row)
        count, size = writer.finalize()
        infos.add(SplitInfo(split, num_examples=count, num_bytes=size))
    DatasetInfo(
        features=features,
        builder_name="parquet",
        dataset_name="chats",
        config_name="default",
        version="0.0.0",
        splits=infos,
    ).write_to_directory(str(folder))


def test_hub_with_a_chat_column(empty_hub_cache: Path) -> None:
    rows = [{"prompt": "x", "talk": said(f"u{i}", f"a{i}")} for i in range(4)]
    fill_cache(empty_hub_cache, {"train_sft": rows[:3], "test_sft": rows[3:]})
    settings = {"hub": "some/chats", "column": "talk", "train_split": "train_sft"}
    data = load_chat("chat", **settings, validation_split="test_sft")
    assert [as_text(each) for each in data.train] == ["u0 a0*", "u1 a1*", "u2 a2*"]
    assert [as_text(each) for each in data.validation] == ["u3 a3*"]
    assert "cached copy" in data.notes[0]
    alone = load_chat("chat", **settings)
    assert len(every(alone)) == 3 and "chosen by a hash" in alone.notes[-1]
    with pytest.raises(UsageError, match=r"no split 'train'(.|\n)*train_sft"):
        load_chat("chat", hub="some/chats", column="talk")
    with pytest.raises(UsageError, match=r"no conversation among the columns of some/chats train"):
        load_chat("chat", hub="some/chats", train_split="train_sft")


def test_an_unreachable_hub_is_reported_with_the_local_alternative(empty_hub_cache: Path) -> None:
    with pytest.raises(DownloadError, match=r"some/other(.|\n)*task\.path") as caught:
        load_chat("chat", hub="some/other")
    assert "HF_HUB_OFFLINE is set" in str(caught.value)
