"""Runs train in local processes, as Slurm jobs and as Ray tasks, with the same results."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any, ClassVar

import pytest
from support.cli_runs import Cli

from sparsegrad_cli.errors import RecipeError, UsageError
from sparsegrad_cli.recipe.study import make_study
from sparsegrad_cli.recipe.study_section import EngineSection, RaySettings, SlurmSettings
from sparsegrad_cli.study import engines
from sparsegrad_cli.study.cluster_engines import RayEngine, SlurmEngine
from sparsegrad_cli.study.coordinator import make_engine
from sparsegrad_cli.study.engines import LocalEngine, shared_cores, visible_gpus

TINY = (
    "task.train_limit=16",
    "task.eval_limit=8",
    "task.max_length=16",
    "train.per_device_train_batch_size=8",
    "train.max_steps=2",
)


class StandIn:
    """A fake process that ends on request."""

    started: ClassVar[list[dict[str, str]]] = []

    def __init__(self, recipe: Path, *, quiet: bool, environment: dict[str, str]) -> None:
        self.code: int | None = None
        self.started.append(environment)

    def wait(self, timeout_s: float | None) -> int | None:
        return self.code

    def stop(self) -> None:
        self.code = 130

    kill = stop


def test_processes_share_the_cores() -> None:
    assert shared_cores(1) == {}
    assert shared_cores(2) == {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 2))}
    assert shared_cores(1000) == {"OMP_NUM_THREADS": "1"}


def test_each_local_run_gets_one_gpu_and_frees_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, GPU-x")
    assert visible_gpus() == ["4", "GPU-x"]
    monkeypatch.setattr(engines, "TrainProcess", StandIn)
    StandIn.started = []
    engine = LocalEngine(2)
    jobs = [engine.submit(Path("r.yaml")) for _ in range(2)]
    jobs[1].stop()
    assert jobs[1].wait(None) == jobs[1].wait(None) == 130
    jobs.append(engine.submit(Path("r.yaml")))
    assert [env["CUDA_VISIBLE_DEVICES"] for env in StandIn.started] == ["4", "GPU-x", "GPU-x"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    LocalEngine(1).submit(Path("r.yaml"))
    assert StandIn.started[-1] == {}


def test_an_engine_can_be_set_in_the_study_or_on_the_command_line() -> None:
    over = ("engine=slurm", "engine.slurm.partition=gpu", "engine.jobs=4", "method.density=0.02")
    study = make_study(None, ("lora",), 1, over)
    assert study.study.engine.name == "slurm" and study.study.engine.jobs == 4
    assert study.study.engine.slurm.parameters() == {
        "timeout_min": 240,
        "slurm_partition": "gpu",
    }
    assert make_study(None, ("lora",), 1, ()).study.engine == EngineSection()
    with pytest.raises(RecipeError, match=r"engine\.slurm\.partiton"):
        make_study(None, ("lora",), 1, ("engine.slurm.partiton=gpu",))


def test_a_missing_requirement_of_an_engine_is_an_error_before_any_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="needs sbatch"):
        make_engine(EngineSection(name="slurm"), tmp_path)

    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UsageError, match="package submitit") as slurm:
        SlurmEngine(SlurmSettings(), tmp_path, None)
    assert slurm.value.fix is not None and "sparsegrad[slurm]" in slurm.value.fix
    with pytest.raises(UsageError, match="package ray"):
        RayEngine(RaySettings(), None)


def compare(cli: Cli, *arguments: str) -> dict[str, Any]:
    command = ("compare", "--methods", "lora,full", "--seeds", "1", "-o", "c", *TINY)
    outcome = cli(*command, *arguments)
    assert outcome.code == 0, outcome.err
    record: dict[str, Any] = json.loads(Path("c/compare.json").read_text())
    return record


def test_slurm_engine_trains_with_submitits_local_executor(
    cli: Cli, tmp_path: Path, small_bert: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit")
    monkeypatch.chdir(tmp_path)
    record = compare(cli, "--engine", "slurm", "engine.slurm.cluster=local", f"model={small_bert}")
    assert (record["status"], record["engine"]) == ("done", "slurm")
    assert len(list((tmp_path / "c" / "slurm" / "1").glob("*_0_result.pkl"))) == 2


@pytest.mark.slow
def test_ray_engine_trains_on_a_cluster_of_two_workers(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="the engine ray needs the package ray, an optional extra")
    from ray.cluster_utils import Cluster

    monkeypatch.chdir(tmp_path)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        record = compare(cli, "--engine", "ray", f"engine.ray.address={cluster.address}")
    finally:
        cluster.shutdown()
    assert (record["status"], record["engine"]) == ("done", "ray")
