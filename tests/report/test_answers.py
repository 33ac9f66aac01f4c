"""Answers of several models side by side in a report, with their grades."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.answered_study import answers_record, save_answers
from support.html_pages import outline, without_figures
from support.record_samples import compare_record, study_of

from sparsegrad_cli.data.questions import Question
from sparsegrad_cli.judge.prompts import grading_prompt
from sparsegrad_cli.judge.verdicts import Grades, read_graded_answers
from sparsegrad_cli.report.render import write_study_report

HOSTILE = (
    "</div></section><script>alert(1)</script><img src=x onerror=alert(1)> &amp; \"'\n"
    "    [bold]x[/bold] | a | b\x1b[2J\x1b[31m\u202egnihton\x00\n"
    "# no heading\n```\n$x$ ~~y~~ *z* [l](http://e)"
)


def written(study: Path, record: dict[str, Any] | None = None) -> tuple[str, str]:
    """(HTML, Markdown) of the report."""
    compared = study_of(record or compare_record())
    with without_figures(figures=False):
        write_study_report(study, compared, read_graded_answers(study, compared))
    return (study / "report.html").read_text(), (study / "report.md").read_text()


def test_columns_are_the_base_model_and_each_method_by_its_first_seed(tmp_path: Path) -> None:
    answers = {
        "base": [["b0", "b1"]],
        "lora 1": [["l0", "l1"]],
        "core 1": [["c0", "c1"]],
        "lora 2": [["never", "shown"]],
    }
    save_answers(tmp_path, answers_record(answers))
    page, markdown = written(tmp_path)
    known = {f"{letter}{turn}" for letter in "blc" for turn in range(2)} | {"q0.0", "q0.1"}
    shown = [text for text in outline(page).text if text in known]
    gist = ["q0.0"]  # in the summary
    assert shown == [*gist, "q0.0", "b0", "l0", "c0", "q0.1", "b1", "l1", "c1"]
    assert "never" not in page + markdown
    assert "| question | base model tiny | lora | core |" in markdown
    assert "| **0 (math)**<br>q0.0 | b0 | l0 | c0 |\n| q0.1 | b1 | l1 | c1 |" in markdown


def test_hostile_answers_are_escaped(tmp_path: Path) -> None:
    made = answers_record({"base": [[HOSTILE]], "lora 1": [[HOSTILE]]}, questions=HOSTILE)
    made["asked"][0] |= {"turns": [HOSTILE], "question_id": HOSTILE, "category": HOSTILE}
    for column in made["columns"]:
        column["answers"][0]["question_id"] = HOSTILE
    made["columns"][0]["model"] = made["columns"][1]["method"] = HOSTILE
    save_answers(tmp_path, made)
    page, markdown = written(tmp_path)
    found = outline(page)
    assert not {"script", "img"} & found.tags
    whole = [text for text in found.text if text.startswith("</div></section><script>")]
    assert sum("␛[2J␛[31m\ufffdgnihton␀" in text for text in whole) >= 3  # asked, said twice
    controls = {chr(code) for code in (*range(0x20), *range(0x7F, 0xA0))} - {"\n"}
    assert not (controls | {"\u202e"}) & set(page + markdown)
    lines = [line for line in markdown.splitlines() if "alert(1)" in line and line[0] == "|"]
    bars = {line.replace("\\|", "").count("|") for line in lines}
    assert bars == {4} and "<script" not in markdown and "<img" not in markdown
    row = lines[-1]
    assert "<br>&nbsp;&nbsp;&nbsp;&nbsp;\\[bold\\]x" in row
    assert r"\$x\$ \~\~y\~\~ \*z\* \[l\](http://e)" in row


def graded(study: Path, lines: list[dict[str, Any]], name: str = "judge-q") -> Grades:
    path = study / name / "verdicts.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Grades(study)


def verdict(grade: Any, answers: list[str], turn: int, **changes: Any) -> dict[str, Any]:
    """As `sparsegrad judge` writes one, on question 0 of :func:`answers_record`."""
    asked = Question(0, "math", ("q0.0", "q0.1"), ("a reference",))
    return {
        "question_id": 0,
        "turn": turn + 1,
        "kind": "single",
        "messages": grading_prompt(asked, answers, turn),
        "judge": "j",
        "status": "decided",
        "verdict": grade,
        **changes,
    }


def test_a_grade_belongs_to_an_answer_and_the_turns_before_it(tmp_path: Path) -> None:
    turns, talk = ["q0.0", "q0.1"], ["one", "two"]
    lines = [verdict(4, talk, 0), verdict(9, talk, 1), verdict(5, talk, 1, judge="k")]
    lines += [verdict(6, ["two", "one"], 0), verdict(7, talk, 0)]  # the last word counts
    found = graded(tmp_path, lines)
    assert found.of(0, turns, talk, 0) == {"j": 7.0}
    assert found.of("0", turns, talk, 1) == {"j": 9.0, "k": 5.0}
    assert found.of(0, turns, ["two", "two"], 0) == {"j": 6.0}
    assert found.of(0, turns, ["other", "two"], 1) == {}  # said after something else
    assert found.of(0, ["q0.0", "another?"], talk, 1) == {}
    assert found.of(1, turns, talk, 0) == {}
    # "one" is part of "one more", and no answer to what was asked.
    assert found.of(0, turns, ["one more", "two"], 0) == {}


@pytest.mark.parametrize(
    "changes",
    [
        {"verdict": None},
        {"verdict": 11},
        {"verdict": True},
        {"verdict": "9"},
        {"status": "failed"},
        {"kind": "pair"},
        {"messages": None},
        {"messages": [{"content": 3}]},
        {"messages": ["x"]},
        {"turn": "1"},
        {"turn": None},
    ],
)
def test_a_line_without_a_valid_grade_is_ignored(tmp_path: Path, changes: dict[str, Any]) -> None:
    found = graded(tmp_path, [verdict(9, ["one"], 0) | changes])
    assert found.of(0, ["q0.0"], ["one"], 0) == {} and found.notes == []


def test_mean_grades_match_a_calculation_by_hand(tmp_path: Path) -> None:
    """Question 0 has two turns, and counts as much as one with a single graded turn."""
    one, two = [["a0", "a1"], ["x", "y"]], [["b0", "b1"], ["x", "y"]]
    save_answers(
        tmp_path, answers_record({"lora 1": one, "lora 2": two, "base": [["p", "p"], ["p", "p"]]})
    )
    second = {"question_id": 1, "messages": grading_prompt(Question(1, None, ("q1.0",)), ["x"], 0)}
    lines = [verdict(2, one[0], 0), verdict(6, one[0], 1), verdict(9, two[0], 0)]
    graded(tmp_path, [*lines, verdict(8, ["x"], 0) | second])
    page, markdown = written(tmp_path)
    # Seed 1: ((2 + 6) / 2 + 8) / 2 = 6. Seed 2: (9 + 8) / 2 = 8.5. 7.25 and 2.5 / sqrt(2).
    assert "| lora | 7.25 ± 1.77 (n 2) |" in markdown
    assert "| base model tiny | – |" in markdown
    for shown in ("grade 2", "grade 6", "grade 8"):
        assert page.count(f">{shown}<") == 1 and markdown.count(f"*{shown}*") == 1
    assert "grade 9" not in page  # of the second seed


def test_missing_and_cut_answers_are_marked(tmp_path: Path) -> None:
    made = answers_record(
        {"lora 1": [["cut"], ["whole"], [" "]], "core 1": [["only"]], "full 1": []}
    )
    made["columns"][0]["answers"][0]["stopped"] = ["length"]
    made["columns"][2] |= {"status": "failed", "error": {"title": "x", "what": "no <adapter>"}}
    save_answers(tmp_path, made)
    page, markdown = written(tmp_path)
    text = outline(page).text
    assert text.count("cut at the token limit") == 1
    assert text.count("(empty)") == 1
    assert text.count("not recorded") >= 2
    assert text.count("failed: no <adapter>") == 3
    assert "- full, seed 1: failed: no &lt;adapter>" in markdown


def test_tasks_and_files_have_sections_of_their_own(tmp_path: Path) -> None:
    made = answers_record({"base": [["b"]], "lora 1": [["chat says"]]})
    made["columns"].append(made["columns"][1] | {"task": "oasst", "run_dir": "x"})
    save_answers(tmp_path, made)
    save_answers(tmp_path, answers_record({"lora 1": [["else"]]}), "other")
    found = read_graded_answers(tmp_path, study_of({}))
    assert [(each.task, len(each.columns)) for each in found] == [
        ("chat", 1),
        ("chat", 2),
        ("oasst", 1),
    ]
    markdown = written(tmp_path)[1]
    assert "## Answers: oasst" in markdown and "## Answers\n" not in markdown


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    save_answers(tmp_path, answers_record({"lora 1": [["x"]]}))
    (tmp_path / "answers" / "torn.json").write_text("{")
    graded(tmp_path, [])
    (tmp_path / "judge-q" / "verdicts.jsonl").write_text("{\n{}\n")
    markdown = written(tmp_path)[1]
    assert "answers/torn.json: torn.json is damaged" in markdown
    assert "verdicts.jsonl:1: the line is damaged" in markdown
    assert "| **0 (math)**<br>q0.0 | x |" in markdown
