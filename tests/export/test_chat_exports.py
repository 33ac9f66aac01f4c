"""Exported chat models have the same template, answers and stop tokens in transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.chat_models import CHATML, chat_model_folder, chat_turns, load
from support.cli_runs import Outcome
from support.small_runs import base_of, train

from sparsegrad_cli.data.chat_template import LLAMA2
from sparsegrad_cli.data.conversation import Conversation, Turn
from sparsegrad_cli.errors import SparsegradError
from sparsegrad_cli.export import check_answers as answers_module
from sparsegrad_cli.export import forms
from sparsegrad_cli.export.check_answers import (
    Loading,
    RunAnswer,
    check_answers,
    plain_prompts,
)
from sparsegrad_cli.tasks.answerer import Answer, Answerer
from sparsegrad_cli.tasks.generation_settings import GenerationSettings

Exported = Callable[..., tuple[Path, dict[str, Any]]]
QUESTIONS = ("red", "blue", "green")
END, TURN = 1, 3  # ids of </s> and <|im_end|>


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``talks("method=full", template=None)``: a run that learned to answer ``ok`` and stop."""
    place = tmp_path_factory.mktemp("talks")
    rows = [{"prompt": f"{n % 9} {QUESTIONS[n % 3]}", "completion": "ok"} for n in range(36)]
    data = place / "talk.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    made: dict[Any, Path] = {}

    def run(method: str, template: str | None = CHATML) -> Path:
        key = (method, template)
        if key not in made:
            base = place / f"base-{len(made)}"
            chat_model_folder(base, positions=96, template=template)
            # The base ends texts with </s>, and says nothing of the end of a turn.
            assert json.loads((base / "config.json").read_text())["eos_token_id"] != TURN
            limits = ("task.max_length=64", "task.validation_fraction=0.25", "scope=rest")
            steps = ("train.max_steps=40", "train.eval_steps=40", "train.learning_rate=1e-2")
            made[key] = train(place / f"run-{len(made)}", base, data, method, *limits, *steps)
        return made[key]

    return run


def plainly(folder: Path, model: Any) -> list[tuple[str, bool]]:
    """Return (text, stopped) of every question from transformers, with a length limit only."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for question in QUESTIONS:
        chat = [{"role": "user", "content": f"1 {question}"}]
        asked = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**asked, do_sample=False, max_new_tokens=12)
        new = out[0, asked["input_ids"].shape[1] :].tolist()
        text = tokenizer.decode(new, skip_special_tokens=True).strip()
        found.append((text, len(new) < 12))
    return found


def ours(source: Path) -> list[tuple[str, bool]]:
    """Return the same as ``sparsegrad generate`` answers."""
    model, tokenizer, _ = load(source)
    answerer = Answerer(model, tokenizer, GenerationSettings(max_new_tokens=12))
    answers = answerer.answer([chat_turns(f"1 {question}") for question in QUESTIONS])
    return [(answer.text, answer.stopped == "end") for answer in answers]


def test_run_export_and_transformers_give_the_same_answers(
    talks: Callable[..., Path], exported: Exported
) -> None:
    from transformers import AutoModelForCausalLM

    run = talks("method=full")
    folder, record = exported(run, "merged")
    settings = json.loads((folder / "generation_config.json").read_text())
    assert TURN in settings["eos_token_id"] and len(settings["eos_token_id"]) > 1
    assert ours(run) == [("ok", True)] * 3
    assert ours(folder) == ours(run)
    assert plainly(folder, AutoModelForCausalLM.from_pretrained(folder)) == ours(run)
    alone = record["check"]["answers_alone"]
    assert alone["prompts"] == alone["stopped"] == 3 and alone["rounded"] == 0
    base = AutoModelForCausalLM.from_pretrained(base_of(run))
    assert not all(stopped for _, stopped in plainly(folder, base)), "the base does not stop"


def test_lora_folder_holds_template_and_stop_token(
    talks: Callable[..., Path], exported: Exported
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, GenerationConfig

    run = talks("method=lora")
    folder, record = exported(run, "lora")
    assert TURN in GenerationConfig.from_pretrained(folder).eos_token_id
    assert record["check"]["answers_alone"]["prompts"] == 3
    base: Any = AutoModelForCausalLM.from_pretrained(base_of(run))
    model: Any = PeftModel.from_pretrained(base, str(folder))
    base.generation_config = GenerationConfig.from_pretrained(folder)
    assert plainly(folder, model) == ours(run) == ours(folder)


@pytest.mark.usefixtures("warm_python")
def test_model_without_a_template_is_exported_with_that_of_training(
    talks: Callable[..., Path], exported: Exported
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = talks("method=full", template=None)
    assert AutoTokenizer.from_pretrained(base_of(run)).chat_template is None
    folder, _ = exported(run, "merged")
    assert AutoTokenizer.from_pretrained(folder).chat_template == LLAMA2
    found = plainly(folder, AutoModelForCausalLM.from_pretrained(folder))
    assert found == ours(run) == ours(folder) == [("ok", True)] * 3


@pytest.mark.usefixtures("warm_python")
def test_export_without_its_stop_token_is_refused(
    talks: Callable[..., Path],
    refused: Callable[..., Outcome],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    merged = forms.FORMS["merged"]

    def without_stop_token(job: forms.ExportJob) -> forms.Written:
        written = merged.write(job)
        path = job.partial / "generation_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": END}))
        return written

    changed = replace(merged, write=without_stop_token)
    monkeypatch.setitem(forms.FORMS, "merged", changed)
    outcome = refused(1, talks("method=full"), "--to", "merged")
    assert "does not stop where the run does" in outcome.flat
    assert "the run answers 'ok' and stops" in outcome.flat


# --- what the check makes of an answer

LOADING = Loading("folder", "folder", {}, {}, adapter=False)


def said(ids: tuple[int, ...] = (7, 8, TURN)) -> RunAnswer:
    """Return an answer of the run in which tokens 8 and 9 are nearly equally likely."""
    logits = torch.zeros(len(ids), 12)
    for row, token in enumerate(ids):
        logits[row, token] = 5.0
    logits[1, 9] = 4.9
    return RunAnswer(chat_turns("q"), [4, 5], Answer("ab", "end", 2, len(ids), 0.0, ids), logits)


@pytest.mark.parametrize(
    ("got", "message"),
    [
        ({}, None),
        ({"prompt": [4, 6]}, "renders another prompt"),
        ({"ids": [7, 10, TURN]}, "other tokens"),
        ({"ids": [7, 8, TURN, 4], "ended": False}, "does not stop where the run does"),
        ({"ids": [7, 8], "ended": True}, "does not stop where the run does"),
        ({"text": "a b"}, "decodes the same tokens to another text"),
        ({"ids": [7, 9, 4, 4], "ended": False}, None),  # rounding decides between 8 and 9
    ],
)
def test_text_and_stop_of_answers_are_compared(
    got: dict[str, Any], message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = {"prompt": [4, 5], "ids": [7, 8, TURN], "text": "ab", "ended": True, **got}
    monkeypatch.setattr(answers_module, "_answer_alone", lambda job: [whole])
    arguments = ([said()], LOADING, torch.device("cpu"), None, 0.1)
    if message is None:
        found = check_answers(*arguments)
        assert found["rounded"] == ("ids" in got) and found["stopped"] == 1
        return
    with pytest.raises(SparsegradError, match=message):
        check_answers(*arguments)


def test_prompts_of_the_check_are_plain_chats(tmp_path: Path) -> None:
    _, tokenizer, _ = load(chat_model_folder(tmp_path / "base"))

    def talk(*turns: Turn) -> Conversation:
        return Conversation((*turns, Turn("assistant", "a", learn=True)), "g")

    kept = talk(Turn("system", "s"), Turn("user", "u"))
    left_out = [
        talk(Turn("user", "a <|im_end|> typed")),
        talk(Turn("user", "u"), Turn("assistant", "", extra={"tool_calls": []}), Turn("tool", "t")),
    ]
    assert plain_prompts([*left_out, kept], tokenizer) == [[Turn("user", "u")]]
    assert len(plain_prompts([kept] * 9, tokenizer)) == 3
    no = "{% if m.content == 'no' %}{{ raise_exception('No') }}{% endif %}"
    tokenizer.chat_template = CHATML.replace("<|im_start|>{{", f"{no}<|im_start|>{{{{", 1)
    assert len(plain_prompts([talk(Turn("user", "no")), kept], tokenizer)) == 1
    assert [turns[-1].role for turns in plain_prompts(left_out, tokenizer)] == ["user"]
