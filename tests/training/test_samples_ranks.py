"""Sample prompts in two processes: whole weights, and weights that FSDP2 shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.adapter_paths import adapter_path
from support.fsdp_runs import (
    batch_settings,
    fsdp_requested,
    joined_process_group,
    make_inputs,
    train_run,
)
from support.tiny_models import one_thread
from support.warm_python import run_two_ranks

PROMPTS = ["Is 12 more?", "Who came home?", "Why?"]
EVALUATED = (
    "train.eval_strategy=steps",
    "train.eval_steps=3",
    "train.per_device_eval_batch_size=2",
)
ASKED = (
    f"train.sample_prompts={json.dumps(PROMPTS)}",
    "train.sample_max_new_tokens=5",
    "train.sample_temperature=0.7",  # Each process draws; all must draw the same.
)


def one_of_two(rank: int, folder: str) -> None:
    """Train with FSDP2 and samples, with whole weights and samples, and without samples."""
    with joined_process_group(rank, folder):
        settings = (*batch_settings(4, 1), *EVALUATED)
        with fsdp_requested():
            train_run("llama", "static", "split", *settings, *ASKED)
        train_run("llama", "static", "whole", *settings, *ASKED)
        train_run("llama", "static", "plain", *settings)


def samples(run: dict[str, Any]) -> list[list[dict[str, Any]]]:
    return [evaluation["samples"] for evaluation in run["metrics"]["history"]]


@pytest.mark.slow  # Seven trainings, half of them in two processes that share the weights.
def test_two_processes_answer_as_one_does(
    tmp_path: Path, warm_client: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_two_ranks(warm_client, one_of_two, make_inputs(tmp_path))
    split, whole, plain = (
        json.loads((tmp_path / name / "run.json").read_text())
        for name in ("split", "whole", "plain")
    )
    assert (split["split_by"], whole["split_by"]) == ("FSDP2", None)
    assert [[each["prompt"] for each in answers] for answers in samples(split)] == [PROMPTS] * 2
    assert samples(split) == samples(whole)
    assert samples(split)[0] != samples(split)[1]  # Training has changed the answers.
    monkeypatch.chdir(tmp_path)
    with one_thread():
        alone = train_run("llama", "static", "one", *batch_settings(8, 1), *EVALUATED, *ASKED)
    assert samples(alone)[0] == samples(split)[0]
    # The answers leave no trace in training.
    expected = load_file(adapter_path(tmp_path / "plain"))
    for name in ("split", "whole"):
        trained = load_file(adapter_path(tmp_path / name))
        assert trained.keys() == expected.keys()
        assert all(torch.equal(trained[key], expected[key]) for key in expected)
    assert split["metrics"]["train"] == plain["metrics"]["train"]
