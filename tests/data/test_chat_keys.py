"""Keys beside role and content that change what is learnt: used, refused, or counted in a note."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.chat_tokenizers import CHATML, byte_level, labelled_parts
from support.oasst_samples import as_text, read, write

from sparsegrad_cli.data.chat_template import ChatTemplate
from sparsegrad_cli.data.chat_tokens import ChatEncoder, encode_conversations
from sparsegrad_cli.data.conversation import ChatData, Conversation
from sparsegrad_cli.errors import DataError, UsageError

LONG = 100_000
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"zone": "string"}}}
CALL = {"id": "1", "type": "function", "function": {"name": "clock", "arguments": {"zone": "utc"}}}

# Writes tools, calls, what they return, and reasoning.
TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}[{{ c.function.name }}"
    "{{ c.function.arguments | tojson }}]{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def user(text: str = "u", **keys: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **keys}


def assistant(text: Any = "a", **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **keys}


def tool(text: str = "noon", **keys: Any) -> dict[str, Any]:
    return {"role": "tool", "content": text, **keys}


def data_of(folder: Path, *rows: Any, suffix: str = "jsonl", **settings: Any) -> ChatData:
    """The rows as training data beside one plain row for validation."""
    plain: dict[str, Any] = {"messages": [user("v"), assistant("w")]}
    if "instruction" in rows[0]:
        plain = {"instruction": "v", "output": "w"}
    elif "prompt" in rows[0]:
        plain = {"prompt": "v", "completion": "w"}
    write(folder / "validation.jsonl", plain)
    if suffix == "parquet":
        from datasets import Dataset

        Dataset.from_list(list(rows)).to_parquet(folder / "train.parquet")
    else:
        write(folder / "train.jsonl", *rows)
    return read(folder, "chat", **settings)


def only(folder: Path, *rows: Any, **settings: Any) -> Conversation:
    (conversation,) = data_of(folder, *rows, **settings).train
    return conversation


def labelled(conversation: Conversation, template: str = TOOLS) -> tuple[str, list[str], list[str]]:
    """The text, its labelled parts and the encoder's notes."""
    tokenizer = byte_level(template)
    encoder = ChatEncoder(tokenizer)
    ids, labels, _ = encoder.encode(conversation, max_length=LONG)
    return tokenizer.decode(ids), labelled_parts(tokenizer, ids, labels), encoder.notes


# --- loss weights


@pytest.mark.parametrize(
    "key",
    [
        {"weight": 0},
        {"weight": 0.0},
        {"weight": "0"},
        {"train": False},
        {"training": False},
        {"trainable": False},
        {"loss": False},
        {"loss_mask": 0},
        {"loss_weight": 0, "train": False},
    ],
)
def test_a_turn_with_a_loss_weight_of_0_is_read_and_not_learnt(
    tmp_path: Path, key: dict[str, Any]
) -> None:
    messages = [user(), assistant("bad", **key), user("again"), assistant("good", weight=1)]
    for row in ({"messages": messages}, {"prompt": [user()], "completion": messages[1:]}):
        data = data_of(tmp_path, row)
        assert [as_text(each) for each in data.train] == ["u bad again good*"]
        assert data.counts["answers with a loss weight of 0, not learnt"] == 1
        assert not data.notes


def test_loss_weights_of_sharegpt_turns_are_used(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "u"},
        {"from": "gpt", "value": "bad", "weight": 0},
        {"from": "human", "value": "again"},
        {"from": "gpt", "value": "good", "weight": 1},
    ]
    assert as_text(only(tmp_path, {"conversations": turns})) == "u bad again good*"


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ({"loss_mask": [0, 0, 0, 1]}, "u a u a*"),
        ({"weights": [1, 0]}, "u a*"),  # one for each answer; what follows the last is cut
        ({"train": [False, True]}, "u a u a*"),
        ({"weight": 1}, "u a* u a*"),
        ({"loss": 2.31}, "u a* u a*"),  # describes the row
    ],
)
def test_a_loss_weight_of_a_row_applies_to_all_its_turns(
    tmp_path: Path, mask: dict[str, Any], expected: str
) -> None:
    row = {"messages": [user(), assistant(), user(), assistant()], **mask}
    assert as_text(only(tmp_path, row)) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"messages": [user(), assistant(weight=0.5)]},
            r"weight of message 2 is 0\.5, expected 0 or 1",
        ),
        ({"messages": [user(), assistant(loss_mask=[0, 1])]}, "loss_mask of message 2 is"),
        ({"messages": [user(), assistant(train=True, weight=0)]}, "message 2 says both weight: 0"),
        (
            {"messages": [user(train=True), assistant()]},
            "train of message 1 asks for a turn of the u",
        ),
        ({"messages": [user(), assistant()], "weight": 0.3}, r"weight of the row is 0\.3"),
        ({"messages": [user(), assistant()], "loss_mask": [0, 1, 1]}, "3 values for 2 turns"),
        ({"messages": [user(), assistant()], "loss_mask": [1, 1]}, "a turn of the user to be"),
        ({"prompt": "u", "completion": "a", "sample_weight": 2}, "sample_weight of the row is 2"),
    ],
)
def test_a_weight_other_than_0_or_1_is_refused_with_its_line(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        data_of(tmp_path, row)
    assert caught.value.where == f"{tmp_path / 'train.jsonl'}:1" and caught.value.fix


def test_masks_are_part_of_the_data_hash(tmp_path: Path) -> None:
    rows = [
        {"messages": [user(), assistant(**key), user(), assistant()]}
        for key in ({}, {"weight": 0}, {"reasoning": "r"}, {"name": "n"})
    ]
    rows.append({**rows[0], "tools": [CLOCK]})
    assert len({data_of(tmp_path, row).data_hash for row in rows}) == len(rows)


def test_learning_the_last_answer_only(tmp_path: Path) -> None:
    rows = [
        {"messages": [user(), assistant("one"), user(), assistant("two", **key)]}
        for key in ({}, {"weight": 0})
    ]
    data = data_of(tmp_path, *rows, train_on="last_answer")
    assert [as_text(each) for each in data.train] == ["u one u two*", "u one*"]
    assert data.counts["training assistant turns learnt"] == 2


# --- tools and reasoning


def test_tools_calls_and_results_go_through_the_template(tmp_path: Path) -> None:
    messages = [
        user("time?"),
        assistant(None, tool_calls=[CALL]),
        tool(tool_call_id="1", name="clock"),
        assistant("It is noon."),
    ]
    conversation = only(tmp_path, {"messages": messages, "tools": [CLOCK]})
    text, parts, notes = labelled(conversation)
    assert parts == ['[clock{"zone": "utc"}]<|im_end|>', "It is noon.<|im_end|>"]
    assert text.startswith(f"<|im_start|>system\n{json.dumps([CLOCK])}<|im_end|>\n")
    assert "<|im_start|>tool\nnoon<|im_end|>" in text
    assert notes == [
        f"the chat template leaves out name of the tool: 1 x; first: {tmp_path / 'train.jsonl'}:1"
    ]


@pytest.mark.parametrize(
    "call",
    [
        {"tool_calls": json.dumps([CALL])},
        {"tool_calls": [{**CALL, "function": {"name": "clock", "arguments": '{"zone": "utc"}'}}]},
        {"function_call": {"name": "clock", "arguments": '{"zone": "utc"}'}},
    ],
)
@pytest.mark.parametrize(
    "tools", [{"tools": json.dumps([CLOCK])}, {"functions": [CLOCK["function"]]}]
)
def test_other_names_of_tools_and_calls_are_read(
    tmp_path: Path, call: dict[str, Any], tools: dict[str, Any]
) -> None:
    text, parts, notes = labelled(
        only(tmp_path, {"messages": [user(), assistant("", **call)], **tools})
    )
    assert parts == ['[clock{"zone": "utc"}]<|im_end|>'] and not notes
    assert json.dumps([CLOCK]) in text


def test_sharegpt_calls_are_read(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "time?"},
        {"from": "function_call", "value": '{"name": "clock", "arguments": {"zone": "utc"}}'},
        {"from": "observation", "value": "noon"},
        {"from": "gpt", "value": "It is noon."},
    ]
    conversation = only(tmp_path, {"conversations": turns, "tools": json.dumps([CLOCK])})
    assert [turn.role for turn in conversation.turns] == ["user", "assistant", "tool", "assistant"]
    template = TOOLS.replace("c.function.name", "c.name").replace("c.function.arg", "c.arg")
    assert labelled(conversation, template)[1][0] == '[clock{"zone": "utc"}]<|im_end|>'


def test_parquet_adds_no_nulls_to_tools(tmp_path: Path) -> None:
    """Arrow gives every object of a column the keys of all the others."""
    other = {"type": "function", "function": {"name": "mail", "parameters": {"to": "string"}}}
    rows = [{"messages": [user(), assistant()], "tools": [each]} for each in (CLOCK, other)]
    data = data_of(tmp_path, *rows, suffix="parquet")
    assert [each.tools for each in data.train] == [[CLOCK], [other]]
    assert all(not turn.extra for each in data.train for turn in each.turns)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("read_as", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_learnt_under_each_of_its_names(
    tmp_path: Path, key: str, read_as: str
) -> None:
    template = TOOLS.replace("reasoning_content", read_as)
    conversation = only(tmp_path, {"messages": [user(), assistant("4", **{key: "two and two"})]})
    _, parts, notes = labelled(conversation, template)
    assert parts == ["<think>two and two</think>4<|im_end|>"] and not notes


def test_control_tokens_typed_into_tools_and_calls_are_text(tmp_path: Path) -> None:
    typed = {"name": "clock", "arguments": {"zone": "<|im_end|>"}}
    call = {"type": "function", "function": typed}
    message = assistant("", tool_calls=[call], reasoning="<|im_end|>")
    tools = [{"type": "function", "function": {"name": "<|im_start|>"}}]
    text, parts, notes = labelled(only(tmp_path, {"messages": [user(), message], "tools": tools}))
    assert parts == ['<think><|im_end|></think>[clock{"zone": "<|im_end|>"}]<|im_end|>']
    assert '"name": "<|im_start|>"' in text and not notes


def test_a_tokenizer_with_another_template_for_tools(tmp_path: Path) -> None:
    tokenizer = byte_level({"default": CHATML, "tool_use": TOOLS})
    row = {"messages": [user(), assistant()], "tools": [CLOCK]}
    ids, _, _ = ChatEncoder(tokenizer).encode(only(tmp_path, row), max_length=LONG)
    assert json.dumps([CLOCK]) in tokenizer.decode(ids)


# --- what the template leaves out

STRIPS = CHATML.replace("m.content", "m.content.split('</think>')[-1]")


@pytest.mark.parametrize(
    ("template", "row", "lost"),
    [
        (
            STRIPS,
            {"messages": [user(), assistant("<think>why</think>yes")]},
            ["text to be learnt"],
        ),
        (CHATML, {"messages": [user(), assistant(reasoning="r")]}, ["reasoning to be learnt"]),
        (CHATML, {"messages": [user(), assistant()], "tools": [CLOCK]}, ["tools"]),
        (
            CHATML,
            {"messages": [user(), assistant("", tool_calls=[CALL]), tool(), assistant()]},
            ["tool_calls to be learnt"],
        ),
        (
            CHATML.replace("in messages", "in messages if m.role != 'tool'"),
            {"messages": [user(), assistant("calls"), tool("noon"), assistant()]},
            ["text of the tool"],
        ),
        (CHATML, {"messages": [user(name="Ann"), assistant()]}, ["name of the user"]),
        # White space is no loss, and a system turn that is put before the question is not lost.
        (
            CHATML.replace("m.content", "m.content | trim"),
            {"messages": [user(" u\n"), assistant("\n a ")]},
            [],
        ),
        (
            CHATML.replace("in messages", "in messages if m.role != 'system'"),
            {"messages": [{"role": "developer", "content": "s"}, user(), assistant()]},
            [],
        ),
    ],
)
def test_parts_that_a_template_leaves_out_are_noted(
    tmp_path: Path, template: str, row: dict[str, Any], lost: list[str]
) -> None:
    data = data_of(tmp_path, row, row)
    encoder = ChatEncoder(byte_level(template))
    encode_conversations(encoder, data.train, max_length=LONG)
    found = [note for note in encoder.notes if "leaves out" in note]
    place = f"{tmp_path / 'train.jsonl'}:1"
    assert found == [f"the chat template leaves out {what}: 2 x; first: {place}" for what in lost]


def test_errors_name_the_line_of_a_file_that_is_split_by_a_hash(tmp_path: Path) -> None:
    rows = [{"messages": [user(f"{n}"), assistant(), user(), assistant()]} for n in range(20)]
    data = read(write(tmp_path / "x.jsonl", *rows), "chat", validation_fraction=0.2)
    places = [each.where for part in (data.train, data.validation) for each in part]
    assert sorted(places) == sorted(f"{tmp_path / 'x.jsonl'}:{n + 1}" for n in range(20))
    refuses = CHATML.replace("{{ m.content }}", "{{ m.content if loop.index < 4 else m.absent.x }}")
    with pytest.raises(DataError, match="refuses the conversation") as caught:
        ChatTemplate(byte_level(refuses), []).render(data.train[0])
    assert caught.value.where == data.train[0].place


# --- other columns


def test_alpaca_history_comes_first(tmp_path: Path) -> None:
    row = {"instruction": "u3", "input": "", "output": "a3", "system": "s"}
    pairs = [["u1", "a1"], ["u2", "a2"]]
    for pairs_given in (pairs, json.dumps(pairs)):
        assert as_text(only(tmp_path, {**row, "history": pairs_given})) == "s u1 a1* u2 a2* u3 a3*"
    last = only(tmp_path, {**row, "history": pairs}, train_on="last_answer")
    assert as_text(last) == "s u1 a1 u2 a2 u3 a3*"
    empty: list[Any] = [None, [], ""]
    for history in empty:
        assert as_text(only(tmp_path, {**row, "history": history})) == "s u3 a3*"
    damaged = {**row, "history": ["u1", "a1"]}
    found = data_of(tmp_path, row, damaged)
    assert found.counts["rows dropped: history is not a list of pairs of texts"] == 1


def test_unused_keys_are_counted_in_one_note(tmp_path: Path) -> None:
    rows = [
        {"messages": [user(id=1), assistant(id=2, score=0.5)], "source": "x", "lang": None},
        {"messages": [user(id=3), assistant(id="")], "source": "y", "lang": "en"},
    ]
    keys = "source (2 rows), lang (1 rows), id (3 messages), score (1 messages)"
    assert data_of(tmp_path, *rows).notes == [f"keys that are not used: {keys}"]


def test_preference_data_is_refused_by_name(tmp_path: Path) -> None:
    pair = {"prompt": "p", "chosen": [user(), assistant()], "rejected": [user(), assistant("b")]}
    file = write(tmp_path / "x.jsonl", pair, {**pair, "chosen": [user("v"), assistant()]})
    with pytest.raises(UsageError, match="preference data") as caught:
        read(file, "chat")
    assert "task.chat.column=chosen" in str(caught.value.fix)
    assert len(read(file, "chat", column="chosen").train) == 1
    rows = [{"prompt": f"p{n}", "completion": "c", "label": n % 2 == 0} for n in range(4)]
    with pytest.raises(DataError, match="preference data"):
        read(write(tmp_path / "y.jsonl", *rows), "chat")
    data = read(tmp_path / "y.jsonl", "chat", kind="prompt_completion")
    assert "keys that are not used: label (4 rows)" in data.notes


def test_tools_nested_hundreds_of_levels_deep_drop_their_row(tmp_path: Path) -> None:
    deep: Any = {}
    for _ in range(200):
        deep = {"properties": deep}
    sound = [{"messages": [user(), assistant(text)]} for text in ("one", "two")]
    data = data_of(tmp_path, {**sound[0], "tools": [deep]}, *sound)
    assert data.counts["rows dropped: tools is nested too deeply, or is not JSON"] == 1
