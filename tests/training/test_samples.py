"""Sample prompts: the model answers them at each evaluation, and the run stays the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.adapter_paths import adapter_path
from support.chat_models import chat_model_folder, chat_turns, load
from support.cli_runs import Cli
from support.small_runs import record, train

from sparsegrad_cli.data.questions import BUILTIN, read_prompts
from sparsegrad_cli.errors import RecipeError, UsageError
from sparsegrad_cli.recipe.load_recipe import digest, load_recipe
from sparsegrad_cli.records.store import load_run
from sparsegrad_cli.report.render import write_run_report
from sparsegrad_cli.tasks.answerer import Answerer
from sparsegrad_cli.tasks.generation_settings import GenerationSettings

PROMPTS = ("Is 12 more?", "Who came home?")
# Dropout draws from the same generator as sampling would.
RUN = ("task={name: chat, max_length: 64}", "method=lora", "method.rank=2", "method.dropout=0.2")
ASKED = (f"train.sample_prompts={json.dumps(PROMPTS)}", "train.sample_max_new_tokens=7")
CHAT = ("task=builtin:dialogues", "model=builtin:smollm2")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the folder of a tiny chat model and a file of conversations."""
    folder = tmp_path_factory.mktemp("samples")
    rows = [{"prompt": f"{n}. Who?", "completion": "The ship. " * (1 + n % 3)} for n in range(32)]
    data = folder / "talk.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return chat_model_folder(folder / "base", positions=128), data


@pytest.fixture(scope="module")
def asked(inputs: tuple[Path, Path]) -> Path:
    """Return a run whose model answers two prompts at a temperature, which draws."""
    folder = inputs[1].parent / "asked"
    return train(folder, *inputs, *RUN, *ASKED, "train.sample_temperature=0.7")


def history(run: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = record(run)["metrics"]["history"]
    return found


def state(run: Path, step: int) -> list[bytes]:
    """Return the files of a checkpoint that decide how training continues."""
    folder = run / f"checkpoint-{step}"
    return [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]


def test_a_run_with_samples_has_the_bits_of_one_without(
    inputs: tuple[Path, Path], asked: Path, tmp_path: Path
) -> None:
    plain = train(tmp_path / "plain", *inputs, *RUN)
    assert len(state(plain, 6)) >= 3  # weights, optimizer state and random state
    assert state(plain, 6) == state(asked, 6)
    one, other = (load_file(adapter_path(run)) for run in (plain, asked))
    assert set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)
    assert record(plain)["metrics"]["train"] == record(asked)["metrics"]["train"]
    assert all("samples" not in evaluation for evaluation in history(plain))


def test_each_evaluation_records_the_answers(asked: Path) -> None:
    evaluations = history(asked)
    assert [evaluation["step"] for evaluation in evaluations] == [0, 3, 6]
    for evaluation in evaluations:
        assert [sample["prompt"] for sample in evaluation["samples"]] == list(PROMPTS)
        assert all(0 < sample["tokens"] <= 7 for sample in evaluation["samples"])
    metrics = record(asked)["metrics"]
    assert all("samples" not in metrics[name] for name in ("initial", "best", "final"))
    lines = map(json.loads, (asked / "steps.jsonl").read_text().splitlines())
    logged = [line["eval"]["samples"] for line in lines if "eval" in line]
    assert logged == [evaluation["samples"] for evaluation in evaluations]


def test_the_first_answers_are_those_of_the_base_model(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    run = train(tmp_path / "greedy", *inputs, *RUN, *ASKED, "train.max_steps=1")
    model, tokenizer, _ = load(inputs[0])
    answerer = Answerer(model, tokenizer, GenerationSettings(max_new_tokens=7))
    expected = [answer.text for answer in answerer.answer([chat_turns(p) for p in PROMPTS])]
    assert [sample["answer"] for sample in history(run)[0]["samples"]] == expected


def test_a_resumed_run_keeps_and_repeats_the_answers(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    settings = (*RUN, *ASKED, "train.save_total_limit=5")
    whole = train(tmp_path / "whole", *inputs, *settings)
    half = Path(shutil.copytree(whole, tmp_path / "half"))
    shutil.rmtree(half / "checkpoint-6")
    shutil.rmtree(half / "adapter")
    train(half, *inputs, *settings, resume=True)
    assert record(half)["resumed_from"] == 3
    assert history(half) == history(whole)
    assert state(half, 6) == state(whole, 6)


def test_the_report_has_a_table_of_answers_by_step(asked: Path) -> None:
    run = load_run(asked)
    assert run.metrics is not None
    write_run_report(asked, run)
    page = (asked / "report.md").read_text()
    table = page[page.index("Answers to the sample prompts") :]
    assert all(prompt in table for prompt in PROMPTS)
    for evaluation in history(asked):
        assert f"| {evaluation['step']} " in table


def test_prompts_come_from_a_list_or_a_file(tmp_path: Path) -> None:
    plain, lines = tmp_path / "p.txt", tmp_path / "p.jsonl"
    plain.write_text("One?\nTwo?\n")
    lines.write_text('{"prompt": "One?"}\n{"prompt": "Two?"}\n')
    assert read_prompts(("One?", "Two?")) == read_prompts(str(plain)) == read_prompts(str(lines))
    with pytest.raises(UsageError, match="expected one turn in each question, got 2"):
        read_prompts(BUILTIN)  # Half of them have a second turn.


def test_a_file_of_prompts_is_relative_to_its_recipe(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("One?\n")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "task: builtin:dialogues\nmodel: builtin:smollm2\ntrain: {sample_prompts: p.txt}\n"
    )
    assert load_recipe(recipe).recipe.train.sample_prompts == str(tmp_path / "p.txt")
    (tmp_path / "p.txt").unlink()
    with pytest.raises(RecipeError) as refused:
        load_recipe(recipe)
    assert "no such file" in refused.value.problems[0].what


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("train.sample_prompts=['Who?']",), "builtin:acceptability trains a classifier"),
        (("task=builtin:dialogues", "train.sample_prompts=[]"), "prompts that are not empty"),
        (
            ("task=builtin:dialogues", "train.sample_max_new_tokens=5"),
            "there are no sample_prompts",
        ),
        (
            ("task=builtin:dialogues", "train.sample_prompts=builtin:q"),
            "unknown built-in questions",
        ),
    ],
)
def test_prompts_that_nothing_answers_are_refused(
    cli: Cli, settings: tuple[str, ...], message: str
) -> None:
    refused = cli("validate", *settings)
    assert refused.code == 2 and message in refused.flat


def test_a_recipe_without_prompts_keeps_its_digest() -> None:
    plain = load_recipe(None, CHAT).recipe
    for changed in ({"sample_prompts": ("Who?",)}, {"sample_max_new_tokens": 5}):
        other = plain.model_copy(update={"train": plain.train.model_copy(update=changed)})
        assert digest(other) != digest(plain)
