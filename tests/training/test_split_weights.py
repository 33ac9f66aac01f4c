"""FSDP2 on two processes gives the update of one process, and its checkpoints are the same.

The tests use the package's own training and accelerate's preparation. accelerate shards on GPUs
only, so tests/support/fsdp_runs.py makes it shard on the CPU, over gloo.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.adapter_paths import adapter_path
from support.checkpoint_files import save
from support.fsdp_runs import BATCH, METHODS, STEPS, batch_settings, make_inputs, train_run
from support.fsdp_worker import CELLS, COMPARED, FILES, one_of_two
from support.tiny_models import one_thread, targets_of
from support.warm_python import run_two_ranks
from torch import Tensor, nn

from sparsegrad_cli.methods.implementation import load_by_name, trainable_state
from sparsegrad_cli.training.checkpoint import load_optimizer


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, warm_client: str) -> Path:
    """Return a folder in which two processes have done all of the above."""
    folder = make_inputs(tmp_path_factory.mktemp("two"))
    run_two_ranks(warm_client, one_of_two, folder)
    return folder


@pytest.fixture
def here(two: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The same, as the working folder of this process, which is alone."""
    monkeypatch.chdir(two)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with one_thread():
        yield two


def record(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "run.json").read_text())
    return found


def losses(run: dict[str, Any]) -> list[float]:
    return [entry["loss"] for entry in run["metrics"]["train"]]


def adapter(run: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(adapter_path(run))
    return found


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def equal(found: Path, expected: Path) -> None:
    one, other = load_file(found), load_file(expected)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("model", "method"), CELLS)
def test_sharded_weights_give_the_update_of_one_process(
    here: Path, model: str, method: str
) -> None:
    two = here / f"two-{model}-{method}"
    basis = ("calibration.basis=" + str(two / "basis.safetensors"),)
    more = basis if method in ("static", "dense") else ()
    alone = train_run(model, method, f"one-{model}-{method}", *batch_settings(BATCH, 1), *more)
    found = record(two)
    assert (found["status"], found["processes"], found["split_by"]) == ("done", 2, "FSDP2")
    assert losses(found) == pytest.approx(losses(alone), rel=1e-5)
    assert len(losses(found)) == STEPS
    assert found["metrics"]["final"]["score"] == pytest.approx(alone["metrics"]["final"]["score"])
    tensors = adapter(two)
    close(tensors, adapter(here / f"one-{model}-{method}"))
    began = {".core", ".values", "lora_B"}  # at zero
    moved = [t for n, t in tensors.items() if any(part in n for part in began)]
    assert (len(moved) > 0) == (method != "full")
    assert all(float(t.abs().max()) > 1e-3 for t in moved)


@pytest.mark.parametrize(("model", "method"), CELLS)
def test_each_process_holds_half_of_the_weights(two: Path, model: str, method: str) -> None:
    """In the optimizer step, each process holds half of the weights, gradients and state."""
    found = record(two / f"two-{model}-{method}")
    there = found["memory"]["phases"]["optimizer"]["categories"]
    trainable = 4 * found["counts"]["trainable"]
    beside = trainable if method != "full" else 0  # what the method has added to the weights
    supports = sum(
        t.nbytes for n, t in adapter(two / f"two-{model}-{method}").items() if "support" in n
    )
    whole = 4 * found["model"]["parameters"] + beside
    # An odd number of rows gives the first process one more.
    assert 0.5 * whole <= there["weights"] - supports <= 0.53 * whole
    assert 0.5 * trainable <= there["gradients"] <= 0.56 * trainable
    assert trainable <= there["optimizer_state"] <= 1.16 * trainable


def test_sharding_works_with_recomputation_and_clipping(here: Path) -> None:
    close(adapter(here / "recomputed"), adapter(here / "two-llama-dense"))
    alone = train_run(
        "llama", "lora", "one-clipped", *batch_settings(BATCH, 1), "train.max_grad_norm=0.01"
    )
    assert losses(record(here / "clipped")) == pytest.approx(losses(alone), rel=1e-5)
    close(adapter(here / "clipped"), adapter(here / "one-clipped"))
    free = adapter(here / "two-llama-lora")
    apart = [n for n, t in adapter(here / "clipped").items() if not torch.allclose(t, free[n])]
    assert apart


@pytest.mark.parametrize("name", COMPARED)
def test_sharded_run_records_the_numbers_of_whole_weights(two: Path, name: str) -> None:
    """The numbers equal those of DistributedDataParallel in every precision."""
    split, whole = (two / f"{way}-{name}" for way in ("split", "whole"))
    assert (record(split)["split_by"], record(whole)["split_by"]) == ("FSDP2", None)
    equal(adapter_path(split), adapter_path(whole))
    assert losses(record(split)) == losses(record(whole))
    # The pooler is not in the base model's files: it is kept as it was drawn, in the model's dtype.
    trained = {name: t for name, t in adapter(split).items() if "pooler" not in name}
    assert {t.dtype for t in trained.values()} <= {torch.float32, torch.int32}
    if name == "autocast":  # it was on
        assert losses(record(split)) != losses(record(two / "two-llama-full"))


@pytest.mark.parametrize("method", ["static", "full"])
def test_resumed_sharded_run_equals_the_uninterrupted_run(two: Path, method: str) -> None:
    straight = two / f"straight-{method}"
    for way, split_by in (("split", "FSDP2"), ("whole", None)):
        resumed = two / f"resumed-{way}-{method}"
        told = record(resumed)
        assert (told["resumed_from"], told["split_by"]) == (2, split_by)
        for name in FILES:
            equal(resumed / "checkpoint-4" / name, straight / "checkpoint-4" / name)
        equal(
            adapter_path(resumed),
            adapter_path(straight),
        )
        assert told["metrics"]["history"] == record(straight)["metrics"]["history"]


@pytest.mark.parametrize("method", ["static", "full"])
def test_sharded_run_keeps_its_best_weights(two: Path, method: str) -> None:
    """The best weights are read back into shards at the end."""
    straight = two / f"straight-{method}"
    best = record(straight)["metrics"]["best"]["step"]
    assert best == 2  # and not the last
    kept, saved = adapter(straight), load_file(straight / f"checkpoint-{best}" / FILES[0])
    for name, tensor in saved.items():
        assert torch.equal(kept[name.replace("sparsegrad_values.default", "values")], tensor)


@pytest.mark.parametrize("method", ["static", "full"])
def test_sharded_checkpoint_equals_that_of_one_process(
    two: Path, tmp_path: Path, method: str
) -> None:
    """Loaded into plain parameters and AdamW and written again, the checkpoint is the same."""
    folder = two / f"straight-{method}" / "checkpoint-4"
    shapes = load_file(folder / FILES[0])
    model = nn.ParameterDict({n.replace(".", "/"): torch.zeros(t.shape) for n, t in shapes.items()})
    load_by_name(model, {name.replace(".", "/"): tensor for name, tensor in shapes.items()})
    # As the run's optimizer has them: in the model's order, which the numbers go by.
    names = [n for n, p in _load_llama(two, method).named_parameters() if p.requires_grad]
    ordered = [model[name.replace(".", "/")] for name in names]
    optimizer = torch.optim.AdamW(ordered)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    load_optimizer(folder, optimizer, schedule)
    for number, parameter in enumerate(ordered):
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape, number
    state = {name.replace("/", "."): tensor for name, tensor in trainable_state(model).items()}
    save(tmp_path, state, optimizer, schedule)
    for name in FILES:
        equal(tmp_path / name, folder / name)


def _load_llama(folder: Path, method: str) -> nn.Module:
    """Return the run's model as its method prepares it."""
    from transformers import LlamaForCausalLM

    from sparsegrad_cli.calibration.basis_file import read_basis
    from sparsegrad_cli.recipe.load_recipe import load_recipe

    model: nn.Module = LlamaForCausalLM.from_pretrained(folder / "llama")
    run = folder / f"straight-{method}"
    settings = load_recipe(None, METHODS[method]).recipe.method
    found = read_basis(run / "basis.safetensors") if method == "static" else None
    settings.implementation().prepare(
        model,
        targets_of(model),
        scope="head",
        bases=found.by_target() if found else None,
        scores=found.scores if found else None,
    )
    return model


def test_nan_loss_in_one_process_ends_both(two: Path) -> None:
    first, second = (json.loads((two / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first["diverged"]["step"] == second["diverged"]["step"] > 1
    assert first["diverged"]["module"] == second["diverged"]["module"] != ""
    assert first["lost"] == second["lost"] == "weight"


def test_whole_weights_are_gathered_from_and_sharded_to_all_processes(two: Path) -> None:
    first, second = (json.loads((two / f"rank{rank}.json").read_text()) for rank in (0, 1))
    expected = (-torch.arange(15.0).view(3, 5)).tolist()
    out = [[-10.0, -35.0, -60.0]]
    assert first["pieces"] == [True, 2, [0], expected, out]
    assert second["pieces"] == [True, 1, [0], "meta", out]


def test_run_notes_that_weights_are_not_sharded_on_a_cpu(two: Path) -> None:
    first = json.loads((two / "rank0.json").read_text())
    assert any("DDP is used instead of FSDP2" in note for note in first["notes"])
    assert record(two / "unsplit")["split_by"] is None
