"""Settings of launchers are read or refused before anything is loaded."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import pytest
from support.paths import REPO

from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.recipe.load_recipe import load_recipe
from sparsegrad_cli.recipe.shipped import LAUNCHERS, shipped_files
from sparsegrad_cli.run import launcher
from sparsegrad_cli.run.launcher import check_sharding
from sparsegrad_cli.training.train import train as train_recipe

SETTINGS = REPO / "configs" / "accelerate"
WORK = {
    "static": (),
    "dense": ("method.support=dense",),
    "lora": ("method=lora",),
    "full": ("method=full", "scope=rest"),
    "autocast": ("train.bf16=true", "model.dtype=bfloat16"),
}
# overrides -> (the key that is named, a word of the error)
DO_NOT = {
    ("method=meprop",): ("method.name", "meprop chooses among all entries"),
    ("method={name: meprop, select: rows}",): ("method.name", "meprop chooses among all entries"),
    ("method.form=rotated",): ("method.form", "rotated needs whole matrices"),
    ("method.form=materialized",): ("method.form", "materialized needs whole matrices"),
    ("method.support=dynamic",): ("method.support", "dynamic chooses among all entries"),
    ("method.support=refresh",): ("method.support", "refresh chooses among all entries"),
    ("model.quantization=4bit",): ("model.quantization", "cannot shard weights of 4bit"),
    ("model.quantization=8bit", "method=lora"): ("model.quantization", "weights of 8bit"),
    ("train.fp16=true",): ("train.fp16", "never been tried"),
    ("train.torch_compile=true",): ("train.torch_compile", "never been tried"),
}


@functools.cache
def launched(name: str, *more: str) -> dict[str, str]:
    """Set the environment with the code of `accelerate launch --config_file`."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    command = ["--config_file", str(SETTINGS / name), *more, "-m", "sparsegrad_cli", "train"]
    before = dict(os.environ)
    try:
        parsed = launch_command_parser().parse_args(command)
        args, defaults, _ = _validate_launch_command(parsed)
        assert args.num_processes == 2
        if args.use_deepspeed:
            args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
            _, said = prepare_deepspeed_cmd_env(args)
        else:
            said = prepare_multi_gpu_env(args)
    finally:
        os.environ.clear()
        os.environ.update(before)
    return {key: value for key, value in said.items() if before.get(key) != value}


def enter(monkeypatch: pytest.MonkeyPatch, said: dict[str, str], rank: int = 0) -> None:
    """Enter the environment of one of the two launched processes."""
    for name in [n for n in os.environ if n.startswith(("ACCELERATE_", "FSDP_"))]:
        monkeypatch.delenv(name)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name, value in said.items():
        if name.startswith(("ACCELERATE_", "FSDP_")):
            monkeypatch.setenv(name, value)


def check(*overrides: str, command: str = "train", resume: bool = False) -> None:
    check_sharding(load_recipe(None, overrides), command, resume=resume)


@pytest.fixture
def deepspeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that DeepSpeed is installed; before a run starts it is only searched for."""
    (tmp_path / "deepspeed").mkdir()
    (tmp_path / "deepspeed" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize("path", shipped_files(LAUNCHERS), ids=lambda path: path.stem)
def test_launcher_settings_are_read_by_accelerate(path: Path) -> None:
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

    found = load_config_from_file(str(path))
    assert isinstance(found, ClusterConfig)
    assert (found.num_processes, found.mixed_precision, found.use_cpu) == (2, "no", False)
    lines = path.read_text().splitlines()
    assert lines[1].startswith(f"# accelerate launch --config_file configs/accelerate/{path.name} ")
    assert ("NEVER RUN" in lines[0]) == path.stem.startswith("deepspeed")
    assert path.is_relative_to(REPO) and len(shipped_files(LAUNCHERS)) == 4


@pytest.mark.parametrize("overrides", WORK.values(), ids=WORK)
def test_fsdp2_accepts_methods_that_train_whole_tensors(
    monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...]
) -> None:
    enter(monkeypatch, launched("fsdp2.yaml"))
    assert launcher.requested_sharding() == launcher.FSDP
    check(*overrides)
    check(*overrides, resume=True)


def test_fsdp2_plugin_is_configured_by_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    enter(monkeypatch, launched("fsdp2.yaml"))
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.auto_wrap_policy is transformer_auto_wrap_policy
    assert plugin.transformer_cls_names_to_wrap is None  # training/accelerator.py names them
    assert not plugin.cpu_ram_efficient_loading and not plugin.activation_checkpointing


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_plugin_is_configured_by_accelerate(
    monkeypatch: pytest.MonkeyPatch, deepspeed: None, stage: int
) -> None:
    from accelerate import DeepSpeedPlugin

    enter(monkeypatch, launched(f"deepspeed_zero{stage}.yaml"))
    assert launcher.requested_sharding() == launcher.DEEPSPEED
    config: dict[str, Any] = DeepSpeedPlugin().deepspeed_config
    assert config["zero_optimization"]["stage"] == stage
    assert config["zero_optimization"]["offload_param"]["device"] == "none"
    assert config["gradient_accumulation_steps"] == config["gradient_clipping"] == "auto"
    check("train.save_strategy=no", "method=lora")


def test_ddp_accepts_every_method(monkeypatch: pytest.MonkeyPatch) -> None:
    enter(monkeypatch, launched("ddp.yaml"))
    assert launcher.requested_sharding() is None
    for overrides in DO_NOT:
        check(*overrides, resume=True)


@pytest.mark.parametrize("settings", ["fsdp2.yaml", "deepspeed_zero3.yaml"])
@pytest.mark.parametrize("overrides", DO_NOT)
def test_methods_that_need_whole_matrices_are_refused(
    monkeypatch: pytest.MonkeyPatch, deepspeed: None, settings: str, overrides: tuple[str, ...]
) -> None:
    enter(monkeypatch, launched(settings))
    key, wrong = DO_NOT[overrides]
    with pytest.raises(UsageError, match=wrong) as caught:
        check(*overrides, "train.save_strategy=no")
    assert caught.value.where is not None and key in caught.value.where
    assert caught.value.fix
    # Calibration ends before weights are sharded.
    check(*overrides, command="calibrate")


@pytest.mark.parametrize(
    ("switch", "wrong", "fix"),
    [
        ("--fsdp_version=1", "version 1 flattens", "fsdp_version: 2"),
        ("--fsdp_auto_wrap_policy=SIZE_BASED_WRAP", "lists of blocks", "TRANSFORMER_BASED_WRAP"),
        ("--fsdp_cpu_ram_efficient_loading=true", "only the first process", "loading: false"),
        ("--fsdp_activation_checkpointing=true", "renames", "train.gradient_checkpointing: true"),
        ("--fsdp_offload_params=true", "gathered from", "fsdp_offload_params: false"),
    ],
)
def test_unsupported_fsdp_settings_are_refused(
    monkeypatch: pytest.MonkeyPatch, switch: str, wrong: str, fix: str
) -> None:
    key, value = switch.removeprefix("--").split("=")
    said = launched("fsdp2.yaml")
    name = key.upper()
    assert name in said
    enter(monkeypatch, {**said, name: value})
    for command in ("train", "calibrate"):
        with pytest.raises(UsageError, match=wrong) as caught:
            check(command=command)
        assert fix in str(caught.value.fix)


def test_unsupported_deepspeed_features_are_refused(
    monkeypatch: pytest.MonkeyPatch, deepspeed: None
) -> None:
    said = launched("deepspeed_zero3.yaml")
    enter(monkeypatch, said)
    with pytest.raises(UsageError, match="pickles of its engine"):
        check()
    with pytest.raises(UsageError, match="bfloat16, also those that train"):
        check("train.save_strategy=no", "train.bf16=true")
    with pytest.raises(UsageError, match="cannot be resumed"):
        check("train.save_strategy=no", resume=True)
    enter(monkeypatch, {**said, "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true"})
    with pytest.raises(UsageError, match="no process has whole weights"):
        check("train.save_strategy=no")


def test_missing_deepspeed_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [])
    enter(monkeypatch, {"ACCELERATE_USE_DEEPSPEED": "true"})
    with pytest.raises(UsageError, match="is not installed"):
        check("train.save_strategy=no")


def test_launcher_precision_must_match_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher's precision would differ from the one in the record."""
    enter(monkeypatch, {**launched("ddp.yaml"), "ACCELERATE_MIXED_PRECISION": "bf16"})
    with pytest.raises(UsageError, match="launcher sets mixed precision bf16, the recipe no"):
        check()
    check("train.bf16=true")


def test_run_is_refused_before_its_folder_is_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said = launched("fsdp2.yaml")
    enter(monkeypatch, said)
    loaded = load_recipe(None, ("model=nowhere", "method=meprop", f"output_dir={tmp_path}/run"))
    with pytest.raises(UsageError, match="meprop chooses"):
        train_recipe(loaded).to_json()
    enter(monkeypatch, said, rank=1)
    with pytest.raises(SystemExit) as ended:  # the first process prints the error
        train_recipe(loaded).to_json()
    assert ended.value.code == 2
    assert not (tmp_path / "run").exists()
