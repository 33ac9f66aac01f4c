"""Estimates equal run.json of whole training runs on conversations, for every method."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.chat_models import byte_tokenizer
from support.paths import REPO
from support.small_runs import record, train
from support.tiny_models import build, one_thread

from sparsegrad_cli.estimate.estimate_steps import estimate_steps
from sparsegrad_cli.estimate.fake_run import Conditions, Kernels
from sparsegrad_cli.recipe.load_recipe import load_recipe
from sparsegrad_cli.training.train import train as train_recipe

# SmolLM2's proportions: three query heads share one of keys and values, the MLP is 8/3 as wide.
SHAPE = {
    "hidden_size": 144,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 192,
    "tie_word_embeddings": True,
}
CORE = ("method.rank=32",)
HALF = ("model.dtype=bfloat16",)
MIXED = (*HALF, "train.bf16=true")
CASES = {
    "full": ("method=full",),
    "lora": ("method=lora",),
    "meprop": ("method=meprop",),
    "materialized": ("method.form=materialized",),
    "core static": CORE,
    "core, recomputed": (*CORE, "train.gradient_checkpointing=true"),
    "full, bf16": ("method=full", *MIXED),
    "core static, bf16": (*CORE, *HALF),
    "core static, autocast": (*CORE, "train.bf16=true"),
    # Short enough for a batch of whole blocks; the last block of all would be padded.
    "lora, concatenated": ("method=lora", "task.chat.packing=concatenate", "task.max_length=64"),
}
MORE = {
    "core dynamic": (*CORE, "method.support=dynamic"),
    "core dense": (*CORE, "method.support=dense"),
    "core refresh": (*CORE, "method.support=refresh"),
    "lora, bf16": ("method=lora", *HALF),
    "meprop, bf16": ("method=meprop", *MIXED),
    "materialized, bf16": ("method.form=materialized", *MIXED),
    "core static, packed": (*CORE, "task.chat.packing=pack"),
    "full, recomputed": ("method=full", "train.gradient_checkpointing=true"),
}


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def talk(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Make a LLaMA model and conversations in which most tokens are answers."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    place = tmp_path_factory.mktemp("talk")
    tokenizer = byte_tokenizer()
    settings = LlamaConfig(vocab_size=len(tokenizer), **SHAPE)
    model: Any = build(AutoModelForCausalLM, settings, seed=3)
    model.save_pretrained(place / "base")
    tokenizer.save_pretrained(place / "base")
    answer = "The children were asleep when the old ship came home. " * 3
    rows = [{"prompt": f"{n}?", "completion": answer[: 120 + 2 * n]} for n in range(16)]
    data = place / "talk.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return place / "base", data


def estimated(run: Path, counted: dict[str, Any], kernels: Kernels) -> dict[str, Any]:
    """Estimate a run's recipe at the batch and length that the run measured."""
    size, length = counted["batch_shape"]
    shape = (f"train.per_device_train_batch_size={size}", f"task.max_length={length}")
    loaded = load_recipe(run / "recipe.yaml", shape)
    (row,) = estimate_steps([(run.name, loaded)], Conditions(kernels=kernels)).rows
    return row.to_json()


@pytest.mark.parametrize(
    "name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]
)
def test_estimate_equals_what_a_run_counts(
    talk: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    limits = ("task.max_length=160", "task.validation_fraction=0.25", "calibration.steps=1")
    brief = ("train.max_steps=2", "train.eval_steps=2", *limits)
    counted = record(train(tmp_path / "run", *talk, *brief, *(CASES | MORE)[name]))["memory"]
    assert counted["batch_shape"][0] == 8 and counted["batch_shape"][1] >= 64
    row = estimated(tmp_path / "run", counted, "cpu")
    weights = counted["phases"]["load"]["peak_bytes"]
    assert row["categories"]["weights"] == weights
    if "calibrate" in counted["phases"]:
        # A run's batch is drawn at random, the estimate's has the longest examples alone.
        expected, found = counted["phases"]["calibrate"]["peak_bytes"], row["calibrate_peak_bytes"]
        assert expected <= found < 1.1 * expected
    for phase in ("forward", "backward", "optimizer"):
        expected, found = counted["phases"][phase]["peak_bytes"], row["phases"][phase]
        assert found == pytest.approx(expected, rel=0.05)
        if phase != "optimizer":  # there a run's meter does not see the batch, the estimate does
            assert found - weights == pytest.approx(expected - weights, rel=0.05)


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the allocator has no say")
@pytest.mark.parametrize("method", ["full", "lora", "meprop", "sparsegrad"])
def test_estimate_equals_what_the_allocator_counts(tmp_path: Path, method: str) -> None:
    """Use SmolLM2 at a batch at which uncounted memory (rounding, workspaces) is small."""
    shape = ("task.train_limit=64", "task.eval_limit=8", "task.max_length=512")
    brief = ("train.per_device_train_batch_size=8", "train.max_steps=2", "calibration.steps=1")
    source = REPO / "configs" / "smollm2_dialogues.yaml"
    overrides = (*shape, *brief, f"method={method}", f"output_dir={tmp_path / 'run'}")
    counted = train_recipe(load_recipe(source, overrides)).to_json()["memory"]
    row = estimated(tmp_path / "run", counted, "cuda")
    for phase in ("forward", "backward"):
        expected = counted["phases"][phase]["peak_bytes"]
        assert row["phases"][phase] == pytest.approx(expected, rel=0.1)
