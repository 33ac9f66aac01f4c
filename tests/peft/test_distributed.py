"""Two processes, by DDP and by FSDP2, give the update that one process gives."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.peft_models import wrapped
from support.tiny_models import batch
from support.warm_python import run_two_ranks
from torch import Tensor, nn

import sparsegrad_cli.peft as sg
from sparsegrad_cli.models.sharded_tensors import gather

pytestmark = pytest.mark.slow

STEPS = 3
# Dropout would differ between processes.
CELLS = [("llama", "static"), ("llama", "dynamic"), ("llama", "refresh"), ("gpt2", "static")]
SPLIT = [("llama", "static"), ("llama", "dense")]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, processes: int) -> None:
    """Take steps on the rows of this process."""
    model.eval()  # without dropout; cores train in either mode
    for step in range(STEPS):
        optimizer.zero_grad()
        rows = {k: t[rank::processes] for k, t in batch(size=8, seed=step).items()}
        model(**rows).loss.backward()
        optimizer.step()


def trained_parameters(model: nn.Module) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def by_ddp(model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    return nn.parallel.DistributedDataParallel(model), sg.optimizer(model, lr=0.1, eps=1e-2)


def by_fsdp(model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    from torch.distributed.fsdp import fully_shard

    inside: Any = model.get_base_model()  # type: ignore[operator]
    for block in inside.model.layers:
        fully_shard(block)
    fully_shard(model)
    return model, sg.optimizer(model, lr=0.1, eps=1e-2)


def work(rank: int, folder: str) -> None:
    """Run all cases in one of two processes; the first one writes what has been trained."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    for name, cells, way in (("ddp", CELLS, by_ddp), ("fsdp", SPLIT, by_fsdp)):
        for architecture, support in cells:
            model = wrapped(architecture, support=support)
            outer, optimizer = way(model)
            train(outer, optimizer, rank, 2)
            whole = gather(trained_parameters(model))
            if rank == 0:
                kept = {n: t.detach().clone().contiguous() for n, t in whole.items()}
                save_file(kept, f"{folder}/{name}-{architecture}-{support}.safetensors")
    try:
        by_fsdp(wrapped("llama", support="dynamic"))
    except ValueError as error:
        Path(f"{folder}/refused-{rank}").write_text(str(error))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # A normal exit races with gloo's threads.


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, warm_client: str) -> Path:
    """Run both processes."""
    folder = tmp_path_factory.mktemp("two")
    run_two_ranks(warm_client, work, folder)
    return folder


def check(found: Path, architecture: str, support: str) -> None:
    model = wrapped(architecture, support=support)
    before = {n: t.detach().clone() for n, t in trained_parameters(model).items()}
    train(model, sg.optimizer(model, lr=0.1, eps=1e-2), 0, 1)
    got = load_file(found)
    expected = trained_parameters(model)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert float((tensor.detach() - before[name]).abs().max()) > 1e-3, name
        torch.testing.assert_close(got[name], tensor.detach(), atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize(("architecture", "support"), CELLS)
def test_ddp_gives_the_update_of_one_process(two: Path, architecture: str, support: str) -> None:
    check(two / f"ddp-{architecture}-{support}.safetensors", architecture, support)


@pytest.mark.parametrize(("architecture", "support"), SPLIT)
def test_fsdp2_gives_the_update_of_one_process(two: Path, architecture: str, support: str) -> None:
    check(two / f"fsdp-{architecture}-{support}.safetensors", architecture, support)


def test_fsdp2_refuses_supports_that_the_optimizer_chooses(two: Path) -> None:
    for rank in range(2):
        assert "use support='static' or 'dense', or DDP" in (two / f"refused-{rank}").read_text()
