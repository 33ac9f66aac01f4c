"""init_from starts training from another run or a PEFT LoRA folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.kill_process import ProcessResult
from support.survival_runs import Workspace, flat, record, results, weights

COMMON = (
    "task=csv",
    "task.max_length=16",
    "train.per_device_train_batch_size=16",
    "train.max_steps=4",
    "train.learning_rate=1e-2",
    "train.lr_scheduler_type=constant",
    "train.warmup_steps=0",
    "train.eval_strategy=steps",
    "train.eval_steps=2",
    "train.load_best_model_at_end=false",
    "train.use_cpu=true",
    "calibration.steps=2",
    "calibration.warmup_steps=2",
)
METHODS = {
    "lora": ("method=lora", "method.rank=2"),
    "core static": ("method.form=core", "method.density=0.05", "method.rank=7"),
    "core dynamic": ("method.form=core", "method.support=dynamic", "method.rank=7"),
}


def train(
    workspace: Workspace, run: Path, method: tuple[str, ...], *more: str, **kill: Any
) -> ProcessResult:
    folders = (f"model={workspace.base}", f"task.path={workspace.data}", "-o", str(run))
    return workspace.fork_server.run("train", *COMMON, *method, *folders, *more, **kill)


@pytest.fixture(scope="module")
def sources(workspace: Workspace) -> dict[str, Path]:
    """Train one run of each method."""
    found = {name: workspace.new_run() for name in METHODS}
    for name, run in found.items():
        ended = train(workspace, run, METHODS[name])
        assert ended.code == 0, ended.err
    return found


@pytest.mark.parametrize("method", METHODS)
def test_run_starts_from_the_final_weights_of_the_source(
    workspace: Workspace, sources: dict[str, Path], method: str
) -> None:
    run, source = workspace.new_run(), sources[method]
    ended = train(workspace, run, METHODS[method], f"init_from={source}")
    assert ended.code == 0, ended.err
    assert f"training starts from {source}; its head is loaded" in flat(ended)
    mine, theirs = record(run), record(source)
    assert mine["metrics"]["initial"]["loss"] == theirs["metrics"]["final"]["loss"]
    assert mine["init_from"]["path"] == str(source)
    assert len(mine["init_from"]["digest"]) == 64
    if method != "lora":
        assert mine["calibration"]["digest"] == theirs["calibration"]["digest"]
        assert (run / "basis.safetensors").is_file()
        assert "calibrate" not in flat(ended).split()
    # Exporting this run needs no file of the other run.
    moved = workspace.new_run()
    shutil.copytree(run, moved)
    exported = workspace.fork_server.run("export", str(moved), "--to", "merged")
    assert exported.code == 0, exported.err


def test_resumed_run_keeps_its_start_values(workspace: Workspace, sources: dict[str, Path]) -> None:
    method, start = METHODS["core static"], f"init_from={sources['core static']}"
    whole, run = workspace.new_run(), workspace.new_run()
    assert train(workspace, whole, method, start).code == 0
    assert train(workspace, run, method, start, point="evaluated", count=3).code == -9
    resumed = train(workspace, run, method, start, "--resume")
    assert resumed.code == 0, resumed.err
    assert weights(run) == weights(whole)
    assert results(record(run)) == results(record(whole))


@pytest.mark.parametrize(
    ("source", "method", "more", "words"),
    [
        ("lora", "lora", ("method.rank=3",), "method.rank is 3 here, and was 2"),
        ("lora", "lora", ("method.rslora=true",), "method.rslora is True here, and was False"),
        ("lora", "lora", ("targets.blocks=[0]",), "target modules is"),
        ("lora", "lora", ("seed=7",), "seed (it draws bert.pooler.dense.bias"),
        ("lora", "core static", (), "method.name is sparsegrad here, and was lora"),
        ("core static", "core static", ("method.density=0.1",), "method.density is 0.1 here"),
        ("core static", "core dynamic", (), "method.support is dynamic here"),
    ],
)
def test_differences_from_the_source_are_named(
    workspace: Workspace,
    sources: dict[str, Path],
    source: str,
    method: str,
    more: tuple[str, ...],
    words: str,
) -> None:
    ended = train(
        workspace, workspace.new_run(), METHODS[method], f"init_from={sources[source]}", *more
    )
    assert ended.code == 2, ended.err
    assert words in flat(ended)


@pytest.mark.parametrize(
    ("source", "more", "words"),
    [
        ("lora", ("method=lora", "method.rank=3"), "method.rank is 3 here, and was 2"),
        ("lora", ("method=sparsegrad",), "method.name is sparsegrad here, and was lora"),
        ("core static", ("scope=rest",), "scope is rest here, and was head"),
    ],
)
def test_validate_compares_the_recipe_with_the_source_record(
    workspace: Workspace, sources: dict[str, Path], source: str, more: tuple[str, ...], words: str
) -> None:
    start = f"init_from={sources[source]}"
    ended = workspace.fork_server.run("validate", *more, start)
    assert ended.code == 2
    assert words in flat(ended) and "command line" in flat(ended)
    assert workspace.fork_server.run("validate", *METHODS[source], start).code == 0


@pytest.mark.parametrize("method", ["full", "meprop"])
def test_method_that_trains_weights_starts_from_an_export(
    workspace: Workspace, sources: dict[str, Path], method: str
) -> None:
    ended = workspace.fork_server.run(
        "validate", f"method={method}", f"init_from={sources['lora']}"
    )
    assert ended.code == 2
    assert "export RUN --to merged" in flat(ended)


def test_folder_without_adapter_and_ineffective_keys_are_refused(
    workspace: Workspace, sources: dict[str, Path]
) -> None:
    ended = workspace.fork_server.run("validate", "method=lora", f"init_from={workspace.data}")
    assert ended.code == 2 and "run.json or adapter_config.json" in flat(ended)
    ended = workspace.fork_server.run(
        "validate", f"init_from={sources['core static']}", "calibration.keep_head=true"
    )
    assert ended.code == 2 and "calibration.keep_head" in flat(ended)


def test_peft_folder_starts_lora_of_its_rank_and_scale(
    workspace: Workspace, sources: dict[str, Path]
) -> None:
    folder = workspace.new_run()
    exported = workspace.fork_server.run(
        "export", str(sources["lora"]), "--to", "lora", "-o", str(folder)
    )
    assert exported.code == 0, exported.err
    config = json.loads((folder / "adapter_config.json").read_text())
    scale = (f"method.rank={config['r']}", f"method.alpha={config['lora_alpha']}")
    run = workspace.new_run()
    ended = train(workspace, run, ("method=lora", *scale), f"init_from={folder}")
    assert ended.code == 0, ended.err
    before = record(sources["lora"])["metrics"]["final"]["loss"]
    assert record(run)["metrics"]["initial"]["loss"] == pytest.approx(before, rel=1e-4)
    assert record(run)["init_from"]["kind"] == "peft"
    other = train(
        workspace, workspace.new_run(), METHODS["lora"], f"init_from={folder}", "method.alpha=9"
    )
    assert other.code == 2 and "method.alpha is 9" in flat(other)
    core = train(workspace, workspace.new_run(), METHODS["core static"], f"init_from={folder}")
    assert core.code == 2 and "is a PEFT adapter of type LORA" in flat(core)


def test_other_classes_keep_the_adapter_and_draw_a_new_head(
    workspace: Workspace, sources: dict[str, Path], tmp_path: Path
) -> None:
    for name in ("train.csv", "validation.csv"):
        text = (workspace.data / name).read_text()
        (tmp_path / name).write_text(text.replace(",low", ",other").replace(",high", ",word"))
    ended = train(
        workspace,
        workspace.new_run(),
        METHODS["lora"],
        f"init_from={sources['lora']}",
        f"task.path={tmp_path}",
    )
    assert ended.code == 0, ended.err
    assert "its head is fresh" in flat(ended)


def test_comparison_refuses_a_start_for_only_one_method(
    workspace: Workspace, sources: dict[str, Path], tmp_path: Path
) -> None:
    from sparsegrad_cli.recipe.load_recipe import digest, load_recipe
    from sparsegrad_cli.study.parity import compared

    plain = load_recipe(None, ("method=lora",)).recipe
    started = load_recipe(None, ("method=lora", f"init_from={sources['lora']}")).recipe
    assert compared(plain)["init_from"] != compared(started)["init_from"]
    assert digest(plain) != digest(started)
