"""A simulated process holds and sends what one of two real processes does.

The real ones train with the package's own training over gloo.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fsdp_runs import FSDP2, make_inputs, recipe_of
from support.tiny_models import one_thread
from support.traffic_worker import CELLS, count_two, settings
from support.warm_python import run_two_ranks

from sparsegrad_cli.errors import SparsegradError, UsageError
from sparsegrad_cli.estimate.estimate_steps import estimate_steps
from sparsegrad_cli.estimate.fake_model import name_task
from sparsegrad_cli.estimate.fake_processes import fake_processes
from sparsegrad_cli.estimate.fake_run import Conditions, FakeRun
from sparsegrad_cli.memory.collectives import Sent
from sparsegrad_cli.models.architectures import configuration_of
from sparsegrad_cli.recipe.load_recipe import LoadedRecipe
from sparsegrad_cli.run.launcher import check_sharding

HELD = ("weights", "bases", "gradients", "optimizer_state")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, warm_client: str) -> Path:
    """Return a folder in which two processes have trained every cell."""
    folder = make_inputs(tmp_path_factory.mktemp("two"))
    run_two_ranks(warm_client, count_two, folder)
    return folder


@pytest.fixture
def here(two: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(two)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with one_thread():
        yield two


def faked(loaded: LoadedRecipe, shard: Any, processes: int) -> FakeRun:
    config, _ = configuration_of(loaded.recipe.model)
    name_task(loaded.recipe, config)
    return FakeRun(loaded, config, Conditions(processes=processes, shard=shard))


@pytest.mark.parametrize("name", CELLS)
def test_a_simulated_process_equals_a_real_one(here: Path, name: str) -> None:
    shard, model, _, micro_batches = CELLS[name]
    counted = json.loads((here / "counted.json").read_text())[name]
    with fake_processes(2):
        fake = faked(recipe_of(model, *settings(name)), shard, 2)
        meter = fake.step(*counted["memory"]["batch_shape"])
    phases = counted["memory"]["phases"]
    peak = meter.peak("optimizer")
    assert peak is not None
    found = phases["optimizer"]["categories"]
    if shard == "ddp":
        # accelerate calls the CPU cpu:0 and copies the model to it; the run keeps the first bases.
        found["weights"] -= found["bases"]
    for category in HELD:
        assert peak.categories[category] == found[category], category
    assert peak.categories["gradients"] > 0 < peak.categories["optimizer_state"]
    # The run also sums the number of rows of the step, and for each micro-batch whether the loss is
    # finite.
    numbers = 1 + micro_batches
    for kind, (calls, payload) in counted["sent"].items():
        more = numbers if kind == "all_reduce" else 0
        assert fake.sent[kind] == Sent(calls - more, payload - 8 * more), kind


@pytest.mark.parametrize("processes", [3, 8, 512])
def test_the_bytes_of_any_number_of_processes_follow_from_the_shapes(
    here: Path, processes: int
) -> None:
    """Full fine-tuning holds and sends what a count of rows by hand gives."""
    loaded = recipe_of("bert", *settings("fsdp2 full"), "train.gradient_accumulation_steps=1")
    with fake_processes(processes):
        fake = faked(loaded, "fsdp2", processes)
        fake.step(2, 16)
        whole = faked(loaded, None, 1).model
    buffers = sum(b.numel() * b.element_size() for b in whole.buffers())
    part = {
        p: 4 * math.ceil(len(p) / processes) * math.prod(p.shape[1:]) for p in whole.parameters()
    }
    trained = processes * sum(size for p, size in part.items() if p.requires_grad)
    payload = processes * sum(part.values())
    assert fake.held_bytes == sum(part.values()) + buffers
    sent = fake.sent["reduce_scatter"]
    assert sent.payload_bytes == trained
    assert sent.sent_bytes("reduce_scatter", processes) == trained * (processes - 1) // processes
    assert payload <= fake.sent["all_gather"].payload_bytes <= 2 * payload


def test_ddp_sends_the_values_that_train_and_nothing_else(here: Path) -> None:
    loaded = recipe_of("bert", *settings("ddp static"), "train.gradient_accumulation_steps=1")
    with fake_processes(64):
        fake = faked(loaded, "ddp", 64)
        fake.step(2, 16)
    trained = sum(p.numel() for p in fake.model.parameters() if p.requires_grad)
    values = sum(p.numel() for n, p in fake.model.named_parameters() if ".sparsegrad_values." in n)
    assert 0 < values < trained  # the head trains too
    marks = 4 * len(list(fake.model.parameters()))  # which parameters got a gradient, int32
    sent = fake.sent["all_reduce"]
    assert 4 * trained <= sent.payload_bytes <= 4 * trained + marks
    assert sent.sent_bytes("all_reduce", 64) == 2 * sent.payload_bytes * 63 // 64
    assert fake.sent["all_gather"].calls == fake.sent["reduce_scatter"].calls == 0


@pytest.mark.parametrize(("shard", "parts"), [("ddp", 1), ("fsdp2", 2)])
def test_the_categories_of_a_process_add_up(here: Path, shard: Any, parts: int) -> None:
    loaded = recipe_of("bert", *settings("fsdp2 static"))
    conditions = Conditions(processes=2, shard=shard)
    (row,) = estimate_steps([("core", loaded)], conditions).rows
    assert row.share is not None
    with fake_processes(2):
        fake = faked(loaded, shard, 2)
    held = row.categories
    assert sum(size or 0 for _, size in held) == row.peak_bytes
    supports = sum(b.nbytes for n, b in fake.model.named_buffers() if "support" in n)
    trained = [p for n, p in fake.model.named_parameters() if ".sparsegrad_values." in n]
    values = sum(4 * math.ceil(p.numel() / parts) for p in trained)
    assert held.adapter == supports + values
    assert held.weights == fake.weights_bytes + row.share.gathered_bytes
    assert (row.share.gathered_bytes > 0) == (shard == "fsdp2")
    assert held.bases > 0
    assert row.share.sent_bytes == sum(c.sent_bytes for c in row.share.collectives)


REFUSED = {
    "dynamic": ("method.support=dynamic",),
    "materialized": ("method={name: sparsegrad, form: materialized}",),
    "meprop": ("method=meprop",),
    "dora": ("method=dora",),
    "galore": ("method=galore",),
    "adamw_8bit": ("method=full", "train.optim=adamw_8bit"),
    "4 bits": ("method=lora", "model.quantization=4bit"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_train_refuses_under_fsdp2_is_refused_with_its_sentence(
    here: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = recipe_of("bert", *REFUSED[name])
    with pytest.raises(UsageError) as told:
        estimate_steps([("it", loaded)], Conditions(processes=2, shard="fsdp2"))
    for key, value in {**FSDP2, "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UsageError) as expected:
        check_sharding(loaded, "train", resume=False)
    assert str(told.value) == str(expected.value)


def test_another_version_of_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    with (
        pytest.raises(SparsegradError, match=r"torch 2\.13, and this is torch 2\.99\.0"),
        fake_processes(8),
    ):
        pass


def test_the_group_of_processes_ends(here: Path) -> None:
    with fake_processes(8):
        with pytest.raises(UsageError, match="group of real processes"), fake_processes(2):
            pass
        assert torch.distributed.get_world_size() == 8
    assert not torch.distributed.is_initialized()
