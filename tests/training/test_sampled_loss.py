"""Runs whose training steps use a loss over a sample of the vocabulary (train.loss)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.chat_models import chat_model_folder
from support.cli_runs import Cli
from support.small_runs import record, train

from sparsegrad_cli.recipe.load_recipe import digest, load_recipe
from sparsegrad_cli.records.store import load_run
from sparsegrad_cli.report.run import facts

CHAT = ("task=builtin:dialogues", "model=builtin:smollm2")
RUN = (
    "task={name: chat, max_length: 64}",
    "method=lora",
    "method.rank=2",
    "train.gradient_accumulation_steps=2",
    "train.save_total_limit=5",
)
LOSSES = {
    "sce": ("train.loss=sce", "train.loss_bucket_classes=40"),
    "rece": ("train.loss=rece", "train.loss_rounds=2"),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the folder of a tiny chat model and a file of conversations."""
    folder = tmp_path_factory.mktemp("sampled")
    rows = [{"prompt": f"{n}. Who?", "completion": "The ship. " * (1 + n % 3)} for n in range(64)]
    data = folder / "talk.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return chat_model_folder(folder / "base", positions=128), data


@pytest.fixture(scope="module")
def plain(inputs: tuple[Path, Path]) -> Path:
    """Return a run with the full loss."""
    return train(inputs[1].parent / "plain", *inputs, *RUN)


def state(run: Path, step: int) -> list[bytes]:
    """Return the files of a checkpoint that decide how training continues."""
    files = sorted((run / f"checkpoint-{step}").glob("*.safetensors"))
    assert len(files) >= 3  # weights, optimizer state and random state
    return [path.read_bytes() for path in files]


@pytest.mark.parametrize("name", LOSSES)
def test_a_run_uses_it_in_training_steps_records_it_and_resumes_bit_for_bit(
    inputs: tuple[Path, Path], plain: Path, tmp_path: Path, name: str
) -> None:
    whole = train(tmp_path / "whole", *inputs, *RUN, *LOSSES[name])
    found, full = record(whole), record(plain)
    assert (found["task"]["training_loss"], full["task"]["training_loss"]) == (name, "full")
    # Evaluations use the full loss, training does not.
    assert found["metrics"]["initial"] == full["metrics"]["initial"]
    assert found["metrics"]["final"]["loss"] < found["metrics"]["initial"]["loss"]
    assert state(whole, 6) != state(plain, 6)
    said = "over a sample of the vocabulary; validation uses the full loss"
    details = [fact.detail for fact in facts(load_run(whole))]
    assert said in details and said not in [fact.detail for fact in facts(load_run(plain))]

    half = Path(shutil.copytree(whole, tmp_path / "half"))
    shutil.rmtree(half / "checkpoint-6")
    shutil.rmtree(half / "adapter")
    train(half, *inputs, *RUN, *LOSSES[name], resume=True)
    assert record(half)["resumed_from"] == 3
    assert state(half, 6) == state(whole, 6)
    assert record(half)["metrics"]["train"] == found["metrics"]["train"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (("train.loss=sce",), "sce samples a vocabulary, and builtin:acceptability trains"),
        ((*CHAT, "train.loss=rece", "train.torch_compile=true"), "torch_compile cannot follow"),
        ((*CHAT, "train.loss=ce"), "'ce' is not one of 'full', 'sce' or 'rece'"),
        ((*CHAT, "train.loss=sce", "train.loss_rounds=2"), "applies to train.loss rece, not to"),
        ((*CHAT, "train.loss_buckets=2"), "train.loss sce and rece, not to full"),
        ((*CHAT, "train.loss=sce", "train.label_smoothing_factor=0.1"), "label smoothing"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    cli: Cli, settings: tuple[str, ...], says: str
) -> None:
    refused = cli("validate", *settings)
    assert refused.code == 2 and says in refused.flat


def test_the_settings_count_in_the_digest_only_if_they_are_set() -> None:
    plain = load_recipe(None, CHAT).recipe
    values = {
        "loss": "sce",
        "loss_buckets": 4,
        "loss_bucket_positions": 4,
        "loss_bucket_classes": 4,
        "loss_mix": False,
        "loss_neighbours": 0,
        "loss_rounds": 2,
    }
    for key, value in values.items():
        train_section = plain.train.model_copy(update={key: value})
        other = plain.model_copy(update={"train": train_section})
        assert digest(other) != digest(plain)
