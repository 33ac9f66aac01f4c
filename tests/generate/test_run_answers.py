"""Runs and their exports answer with the trained weights, without the data of the run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.chat_models import chat_model_folder, chat_turns, load
from support.cli_runs import METHODS, Cli
from support.small_runs import train

from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.tasks.answerer import Answerer
from sparsegrad_cli.tasks.generation_settings import GenerationSettings

QUESTIONS = ("Is 12 more?", "And 7?", "Who came home?", "What was old?")
ANSWERS = ("It is, by 5.", "No.", "The ship.")


Trained = Callable[..., Path]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with ``base``, a model, and later one run per method."""
    folder = tmp_path_factory.mktemp("chats")
    chat_model_folder(folder / "base", positions=128)
    return folder


@pytest.fixture(scope="module")
def trained(place: Path) -> Trained:
    """``trained("lora")``: a run whose data has gone since."""

    def run(name: str, *, stop: bool = False) -> Path:
        folder = place / f"{name}{'-stopped' * stop}"
        if not folder.is_dir():
            rows = [
                {"prompt": f"{n}. {QUESTIONS[n % 4]}", "completion": ANSWERS[n % 3]}
                for n in range(32)
            ]
            data = place / f"{folder.name}.jsonl"
            data.write_text("".join(json.dumps(row) + "\n" for row in rows))
            method = ("method.rank=8",) if name == "core" else METHODS[name]
            task = ("task.name=chat", "task.max_length=64", "train.learning_rate=5e-2")
            train(folder, place / "base", data, *task, *method, stop=stop)
            data.rename(data.with_suffix(".gone"))
        return folder

    return run


def answers(loaded: tuple[Any, Any, dict[str, Any]]) -> list[str]:
    answerer = Answerer(*loaded[:2], GenerationSettings(max_new_tokens=12))
    return [a.text for a in answerer.answer([chat_turns(q) for q in QUESTIONS])]


def export(cli: Cli, run: Path, form: str) -> None:
    """Export into a folder named after the form. The check of an export needs the data."""
    data = run.with_suffix(".gone")
    made = cli("export", str(run), f"task.path={data}", "--to", form, "-o", form, "-q")
    assert made.code == 0, made.err


@pytest.mark.parametrize("name", ["lora", "core", "sparsegrad"])
def test_a_run_and_its_merged_export_give_the_same_answers_without_data(
    cli: Cli, place: Path, trained: Trained, name: str
) -> None:
    run = trained(name)
    export(cli, run, "merged")
    loaded, merged, base = load(run), load("merged"), load(place / "base")
    ids = torch.randint(4, 260, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        mine, theirs, plain = (found[0](ids).logits for found in (loaded, merged, base))
    assert (mine - theirs).abs().max() < 1e-3 < 1e-1 < (mine - plain).abs().max()
    assert answers(loaded) == answers(merged) != answers(base)
    record = loaded[2]
    assert (record["kind"], record["source"], record["model"]) == ("run", "adapter", str(run))
    assert record["recipe_digest"] == json.loads((run / "run.json").read_text())["recipe_digest"]
    assert record["digest"] == load(run)[2]["digest"] != base[2]["digest"]


def test_other_exports_give_the_same_answers(cli: Cli, trained: Trained) -> None:
    expected = answers(load(trained("core")))
    for form in ("lora", "adapter"):
        export(cli, trained("core"), form)
        loaded = load(form)
        assert loaded[2]["kind"] == form and answers(loaded) == expected


def test_a_stopped_run_answers_from_its_checkpoint(place: Path, trained: Trained) -> None:
    loaded = load(trained("lora", stop=True))
    assert loaded[2]["source"].startswith("checkpoint-")
    assert answers(loaded) == answers(load(trained("lora"))) != answers(load(place / "base"))


def test_a_moved_base_model_is_named_by_an_override(
    place: Path, trained: Trained, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(trained("lora"), tmp_path / "run"))
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace(str(place / "base"), str(tmp_path / "base")))
    with pytest.raises(UsageError) as caught:
        load(run)
    assert "model.name" in str(caught.value)
    there = f"model.name={place / 'base'}"
    assert answers(load(run, overrides=(there,))) == answers(load(trained("lora")))
    other = chat_model_folder(tmp_path / "other", positions=128, seed=4)
    with pytest.raises(UsageError, match="does not hold the weights"):
        load(run, overrides=(f"model.name={other}",))
    with pytest.raises(UsageError, match="cannot be changed"):
        load(run, overrides=(there, "method.rank=4"))
    with pytest.raises(UsageError, match="--dtype"):
        load(run, overrides=(there,), dtype="bfloat16")
