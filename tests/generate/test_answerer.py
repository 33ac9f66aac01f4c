"""Answers: greedy ones do not depend on the batch, sampled ones depend on the seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.chat_models import chat_model_folder, chat_turns, load

from sparsegrad_cli.data.conversation import Turn
from sparsegrad_cli.tasks.answerer import Answerer, ChatPrompts
from sparsegrad_cli.tasks.generation_settings import GenerationSettings

TALKS = [
    chat_turns("What is red?"),
    chat_turns("Hi"),
    chat_turns("Name a colour.", "Blue.", "One more."),
]


@pytest.fixture
def babbler(tmp_path: Path) -> tuple[Any, Any]:
    """Return a tiny random model with 120 positions, and its tokenizer."""
    return load(chat_model_folder(tmp_path / "m", positions=120))[:2]


def tiny(babbler: tuple[Any, Any], **settings: Any) -> Answerer:
    return Answerer(*babbler, GenerationSettings(**{"max_new_tokens": 12, **settings}))


@torch.no_grad()
def one_by_one(model: Any, prompt: list[int], count: int, end: set[int]) -> list[int]:
    """Return the most likely tokens, one forward pass each, without cache and padding."""
    ids = list(prompt)
    while len(ids) < len(prompt) + count and not (ids[len(prompt) :] and ids[-1] in end):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_batched_streamed_and_token_by_token_answers_agree(babbler: tuple[Any, Any]) -> None:
    model, tokenizer = babbler
    answerer = tiny(babbler, system="Be brief.")
    prompts = ChatPrompts(tokenizer)
    batched = answerer.answer(TALKS)
    lengths = {answer.prompt_tokens for answer in batched}
    assert len(lengths) == len(TALKS)  # so that all but one were padded
    for talk, together in zip(TALKS, batched, strict=True):
        told: list[str] = []
        streamed = answerer.stream(talk, told.append)
        prompt = prompts.ids([Turn("system", "Be brief."), *talk])
        ids = one_by_one(model, prompt, 12, prompts.end)
        text = tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert together.text == streamed.text == "".join(told).strip() == text != ""
        assert together.stopped == streamed.stopped
        assert together.stopped == ("end" if ids[-1] in prompts.end else "length")
        for answer in (together, streamed):
            assert (answer.prompt_tokens, answer.tokens) == (len(prompt), len(ids))


def test_rows_of_a_batch_are_independent(babbler: tuple[Any, Any]) -> None:
    answerer = tiny(babbler)
    talks = [chat_turns("a" * count) for count in (1, 30, 7, 18)]
    alone = [answerer.answer([talk])[0] for talk in talks]
    for talk_order in ([0, 1, 2, 3], [3, 1], [2, 0, 1]):
        together = answerer.answer([talks[k] for k in talk_order])
        assert [a.text for a in together] == [alone[k].text for k in talk_order]


def test_the_system_prompt_comes_first(babbler: tuple[Any, Any]) -> None:
    (told,) = tiny(babbler, system="Be brief.").answer([chat_turns("Hi")])
    (same,) = tiny(babbler).answer([[Turn("system", "Be brief."), *chat_turns("Hi")]])
    (plain,) = tiny(babbler).answer([chat_turns("Hi")])
    assert told.text == same.text != plain.text
    assert told.prompt_tokens == same.prompt_tokens > plain.prompt_tokens


def test_the_sampling_settings_of_the_model_are_ignored(
    babbler: tuple[Any, Any],
) -> None:
    (plain,) = tiny(babbler).answer([chat_turns("Hi")])
    babbler[0].generation_config.update(
        do_sample=True, temperature=3.0, top_k=5, repetition_penalty=1.9, min_new_tokens=9
    )
    assert tiny(babbler).answer([chat_turns("Hi")])[0].text == plain.text


def test_the_end_tokens_of_the_model_end_an_answer(babbler: tuple[Any, Any]) -> None:
    """If the first token of the answer is an end token, the answer ends there."""
    model, tokenizer = babbler
    prompt = ChatPrompts(tokenizer).ids(chat_turns("a"))
    first = int(model(torch.tensor([prompt])).logits[0, -1].argmax())
    model.generation_config.eos_token_id = [first, 0]
    (answer,) = tiny(babbler).answer([chat_turns("a")])
    assert (answer.stopped, answer.tokens, answer.text) == ("end", 1, "")


def test_sampling_depends_on_the_seed_and_top_p(babbler: tuple[Any, Any]) -> None:
    talks = [chat_turns("Write a line about rain."), chat_turns("Hi")]

    def texts(**settings: float) -> list[str]:
        return [answer.text for answer in tiny(babbler, **settings).answer(talks, "batch")]

    drawn = texts(temperature=1.5, seed=1)
    assert texts(temperature=1.5, seed=1) == drawn
    assert texts(temperature=1.5, seed=2) != drawn
    greedy = texts()
    assert drawn != greedy
    assert texts(temperature=1.5, top_p=1e-6) == greedy
    assert texts(temperature=1e-4) == greedy


def test_every_token_can_be_sampled(babbler: tuple[Any, Any]) -> None:
    """At a high temperature all 260 tokens are equally likely; transformers keeps 50 by default."""
    ids: set[int] = set()
    for seed in range(40):
        answerer = tiny(babbler, temperature=1e4, seed=seed, max_new_tokens=8)
        ids.update(i for row in answerer._run([[4, 5, 6]] * 4, "x") for i in row)
    assert len(ids) > 200


def test_the_global_random_state_is_unchanged(babbler: tuple[Any, Any]) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    tiny(babbler, temperature=1.0).answer([chat_turns("Hi")])
    assert torch.equal(torch.rand(3), expected)


def test_a_row_without_positions_left_is_cut_alone(babbler: tuple[Any, Any]) -> None:
    answerer = tiny(babbler, max_new_tokens=40)
    short, long, endless = chat_turns("a"), chat_turns("b" * 77), chat_turns("c" * 200)
    alone = [answerer.answer([talk])[0] for talk in (short, long, endless)]
    together = answerer.answer([short, long, endless])
    assert [a.text for a in together] == [a.text for a in alone]
    assert [a.tokens for a in together] == [a.tokens for a in alone]
    assert alone[0].stopped in ("end", "length")
    assert alone[1].prompt_tokens + alone[1].tokens == 120 and alone[1].stopped == "full"
    assert (alone[2].text, alone[2].tokens, alone[2].stopped) == ("", 0, "full")
    assert answerer.stream(endless, lambda text: None).stopped == "full"


def test_the_model_is_usable_after_ctrl_c(babbler: tuple[Any, Any]) -> None:
    answerer = tiny(babbler, max_new_tokens=40, temperature=1.0)
    whole: list[str] = []
    answerer.stream(chat_turns("a"), whole.append)

    def press(text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answerer.stream(chat_turns("a"), press)
    again: list[str] = []
    answerer.stream(chat_turns("a"), again.append)
    assert again == whole != []
