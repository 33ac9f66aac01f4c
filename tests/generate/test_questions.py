"""All formats of questions, and errors that name the place in the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparsegrad_cli.data.questions import Question, read_questions
from sparsegrad_cli.errors import SparsegradError


def test_the_built_in_questions_are_read() -> None:
    questions = read_questions("builtin:questions")
    assert len(questions) == 12
    assert len({question.category for question in questions}) >= 6
    assert sum(len(question.turns) == 2 for question in questions) >= 5
    assert sum(bool(question.reference) for question in questions) >= 6
    for question in questions:
        assert all(question.right_answer(turn) for turn in range(len(question.reference)))
        assert question.right_answer(len(question.turns)) is None


def test_the_mt_bench_format_is_read(tmp_path: Path) -> None:
    path = tmp_path / "question.jsonl"
    lines = [
        {"question_id": 81, "category": "writing", "turns": ["a", "b"]},
        {"question_id": 82, "category": "math", "turns": ["c", "d"], "reference": ["C", ""]},
    ]
    path.write_text("\ufeff" + "\n\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    first, second = read_questions(str(path))
    assert first == Question(81, "writing", ("a", "b"))
    assert second == Question(82, "math", ("c", "d"), ("C", None))
    assert [second.right_answer(turn) for turn in (0, 1)] == ["C", None]


def test_prompts_and_plain_lines_are_read(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "one\\ntwo", "reference": "3"}\n{"prompt": "4"}')
    assert read_questions(str(tmp_path / "p.jsonl")) == [
        Question(1, None, ("one\ntwo",), ("3",)),
        Question(2, None, ("4",)),
    ]
    (tmp_path / "lines").write_text("one \n\n  two {x}\r\nth\u2028ree", encoding="utf-8")
    assert [q.turns for q in read_questions(str(tmp_path / "lines"))] == [
        ("one",),
        ("two {x}",),
        ("th\u2028ree",),
    ]
    (tmp_path / "braces.txt").write_text('{"a": what is that?}')
    assert read_questions(str(tmp_path / "braces.txt"))[0].turns == ('{"a": what is that?}',)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"prompt": "a"}\n{"prompt": \n', "q.jsonl:2"),
        ('{"prompt": "a"}\n{"prompt', "incomplete"),
        ('{"prompt": "a"}\n["b"]\n', "expected a JSON object"),
        ('{"question": "a"}\n', "question 1"),
        ('{"turns": []}\n', "turns"),
        ('{"turns": ["a", " "]}\n', "empty"),
        ('{"turns": ["a", 3]}\n', "turns"),
        ('{"prompt": "\\ud800"}\n', "prompt"),
        ('{"prompt": "a", "category": 3}\n', "category"),
        ('{"prompt": "a", "question_id": [1]}\n', "question_id"),
        ('{"prompt": "a", "question_id": true}\n', "question_id"),
        ('{"prompt": "a", "reference": ["b", "c"]}\n', "reference"),
        ('{"prompt": "a", "reference": [3]}\n', "reference"),
        (
            '{"prompt": "a", "question_id": "1"}\n{"prompt": "b", "question_id": 1}\n',
            "two questions",
        ),
        ("\n \n", "no questions"),
        (b"\xff\xfe{", "UTF-8"),
        ("[" * 100_000, "incomplete"),
    ],
)
def test_a_malformed_question_is_refused(tmp_path: Path, content: str | bytes, says: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SparsegradError) as caught:
        read_questions(str(path))
    assert says in str(caught.value) and "q.jsonl" in str(caught.value)


@pytest.mark.parametrize("source", ["nowhere.jsonl", "nowhere", "builtin:other", "."])
def test_a_missing_file_is_refused(source: str) -> None:
    with pytest.raises(SparsegradError, match="builtin:questions"):
        read_questions(source)
