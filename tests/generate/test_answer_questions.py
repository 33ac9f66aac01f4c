"""A file of answers has one line for each question, weights and settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.chat_models import chat_model_folder, load

from sparsegrad_cli.data.conversation import Turn
from sparsegrad_cli.data.questions import Question
from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.generate.answer_questions import answer_questions, default_output
from sparsegrad_cli.generate.options import GenerateOptions, ModelOptions
from sparsegrad_cli.io.jsonl import read_records
from sparsegrad_cli.progress import Observer
from sparsegrad_cli.tasks.answerer import Answerer
from sparsegrad_cli.tasks.generation_settings import GenerationSettings

QUESTIONS = [
    Question(1, "math", ("2 + 2?", "Twice that?"), ("4", "8")),
    Question("w", None, ("Write.",)),
    Question(3, "math", ("3 * 3, said at length?", "And then?", "And then?")),
]


class Asker:
    """A tiny model and a file. ``ask`` is one call of the command."""

    def __init__(self, folder: Path) -> None:
        self.model, self.tokenizer, self.about = load(chat_model_folder(folder / "m"))
        self.path = folder / "answers.jsonl"

    def ask(
        self, questions: list[Question] = QUESTIONS, batch_size: int = 2, **settings: Any
    ) -> dict[str, Any]:
        chosen = GenerationSettings(**{"max_new_tokens": 6, **settings})
        answerer = Answerer(self.model, self.tokenizer, chosen)
        options = GenerateOptions(
            ModelOptions("m"), chosen, "q.jsonl", batch_size=batch_size, output=self.path
        )
        return answer_questions(answerer, self.about, questions, options, Observer())


@pytest.fixture
def asker(tmp_path: Path) -> Asker:
    return Asker(tmp_path)


def test_a_line_holds_the_question_the_model_and_the_settings(asker: Asker) -> None:
    record = asker.ask()
    assert (record["asked"], record["kept"]) == (3, 0)
    lines, torn = read_records(asker.path)
    assert torn == b"" and len(lines) == 3
    assert [{k: v for k, v in line.items() if k != "format"} for line in lines] == record["answers"]
    for line, question in zip(lines, QUESTIONS, strict=True):
        assert line["format"] == "sparsegrad-answers-1"
        assert line["question_id"] == question.id and line["turns"] == list(question.turns)
        assert len(line["answers"]) == len(question.turns) == len(line["stopped"])
        assert all(count <= 6 for count in line["answer_tokens"])
        assert line["digest"] == asker.about["digest"] and line["model"] == asker.about["model"]
        assert line["settings"] == {
            "system": None,
            "max_new_tokens": 6,
            "temperature": 0.0,
            "top_p": None,
            "seed": None,
        }


def test_later_turns_follow_the_earlier_answers(asker: Asker) -> None:
    line = asker.ask()["answers"][0]
    answerer = Answerer(asker.model, asker.tokenizer, GenerationSettings(max_new_tokens=6))
    first, second = line["turns"]
    talk = [Turn("user", first), Turn("assistant", line["answers"][0]), Turn("user", second)]
    (again,) = answerer.answer([talk])
    assert again.text == line["answers"][1]
    assert again.prompt_tokens == line["prompt_tokens"][1]


def test_earlier_answers_are_kept(asker: Asker) -> None:
    first = asker.ask(QUESTIONS[:2])
    again = asker.ask(batch_size=1)
    assert (again["asked"], again["kept"]) == (1, 2)
    assert again["answers"][:2] == first["answers"]
    content = asker.path.read_bytes()
    # Drawing has no seed where nothing is drawn.
    assert asker.ask(seed=9, top_p=0.5)["asked"] == 0
    assert asker.path.read_bytes() == content


def test_greedy_answers_do_not_depend_on_the_batch(asker: Asker, tmp_path: Path) -> None:
    together = asker.ask(batch_size=3)["answers"]
    asker.path = tmp_path / "others.jsonl"
    alone = asker.ask(batch_size=1)["answers"]
    assert [line["answers"] for line in alone] == [line["answers"] for line in together]


def test_other_settings_weights_or_wordings_are_asked_again(asker: Asker) -> None:
    assert asker.ask()["asked"] == 3
    assert asker.ask(max_new_tokens=5)["asked"] == 3
    assert asker.ask(system="Be brief.")["asked"] == 3
    assert asker.ask(temperature=1.0)["asked"] == 3
    assert asker.ask(temperature=1.0, seed=1)["asked"] == 3
    changed = [Question(1, "math", ("2 + 3?", "Twice that?")), *QUESTIONS[1:]]
    assert asker.ask(changed)["asked"] == 1
    asker.about = {**asker.about, "digest": "other"}
    assert asker.ask()["asked"] == 3
    assert len(read_records(asker.path)[0]) == 19


def test_a_torn_line_is_answered_again(asker: Asker) -> None:
    lines = asker.ask()["answers"]
    content = asker.path.read_bytes()
    asker.path.write_bytes(content[:-25])
    again = asker.ask()
    assert (again["asked"], again["kept"]) == (1, 2)
    assert [line["answers"] for line in again["answers"]] == [line["answers"] for line in lines]
    assert len([json.loads(line) for line in asker.path.read_text().splitlines()]) == 3


@pytest.mark.parametrize(
    ("model", "questions", "path"),
    [
        ("runs/x/", "builtin:questions", "runs/answers/runs-x-questions.jsonl"),
        ("builtin:smollm2", "../my questions.jsonl", "builtin-smollm2-my-questions"),
        ("meta-llama/Llama-2-7b", "q.txt", "runs/answers/meta-llama-Llama-2-7b-q.jsonl"),
    ],
)
def test_default_output_path(model: str, questions: str, path: str) -> None:
    assert path in str(default_output(model, questions))
    assert default_output(model, questions).parent == Path("runs/answers")


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"max_new_tokens": 0},
        {"seed": -1},
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="expected"):
        GenerationSettings(**wrong)
