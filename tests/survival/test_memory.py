"""Real out-of-memory errors, in a process with limited address space."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.kill_process import ForkServer, ProcessResult
from support.small_runs import base_folder, data_folder, sentences
from support.survival_runs import flat, record
from support.tiny_models import one_thread

from sparsegrad_cli.calibration.run_calibration import RunCalibration
from sparsegrad_cli.errors import OutOfMemoryError
from sparsegrad_cli.progress import Observer
from sparsegrad_cli.recipe.load_recipe import load_recipe
from sparsegrad_cli.records.store import RunWriter
from sparsegrad_cli.run.open_run import Run
from sparsegrad_cli.tasks.setup import load

ROWS, WIDE = 512, 2048  # an activation of the wide layer: 512 x 11 x 2048 x 4 bytes, 44 MiB
WIDE_ONE = ROWS * 11 * WIDE * 4
# Limits in MiB at which three activations do not fit but a small batch does. Libraries need a part
# that differs between machines, so the first limit at which memory runs out is used.
LEFT = (100, 110, 120, 90, 130)
ONEDNN_FAILURE = "could not create a primitive"
Short = Callable[..., tuple[ProcessResult, dict[str, Any], Path]]


@pytest.fixture(scope="module")
def short(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Short:
    """Return ``short("full", 100)``, a run with 100 MiB of address space left after loading."""
    place = tmp_path_factory.mktemp("memory")
    with one_thread():
        base = base_folder(place / "base", hidden_size=32, intermediate_size=WIDE)
    data = place / "data"
    data.mkdir()
    for name, seed in (("train", 1), ("validation", 2)):
        with (data / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *sentences(seed, ROWS)])
    common = (
        f"model={base}",
        "task=csv",
        f"task.path={data}",
        "task.max_length=16",
        f"train.per_device_train_batch_size={ROWS}",
        "train.per_device_eval_batch_size=16",
        "train.max_steps=2",
        "train.eval_strategy=steps",
        "train.eval_steps=1",
        "train.use_cpu=true",
        "train.unpadded=false",  # The sizes below count padding.
        "calibration.steps=1",
        "calibration.warmup_steps=0",
    )
    numbers = iter(range(100))

    def run(
        *settings: str, left: int, point: str = "short-of-memory"
    ) -> tuple[ProcessResult, dict[str, Any], Path]:
        folder = place / f"run-{next(numbers)}"
        command = ("train", *common, *settings, "-o", str(folder))
        ended = fork_server.run(*command, point=point, count=left)
        return ended, record(folder), folder

    return run


def checked(ended: ProcessResult, run: dict[str, Any]) -> dict[str, Any]:
    """Check exit code 3 and the status, and return the error block."""
    assert ended.code == 3, ended.err
    assert run["status"] == "out_of_memory" and "Traceback" not in ended.err
    error: dict[str, Any] = run["error"]
    assert f"memory ran out in {error['what'].partition(' in ')[2]}" in flat(ended)
    return error


def test_forward_error_names_the_module_and_a_batch_that_fits(short: Short) -> None:
    """The wide activation must fail, and a batch must fit; otherwise try another limit."""
    for left in LEFT:
        ended, run, _ = short("method=full", left=left)
        failure = run["error"] if ended.code == 3 else {}
        if failure.get("asked_bytes") == WIDE_ONE and failure["fits"]:
            break
    error = checked(ended, run)
    assert error["asked_bytes"] == WIDE_ONE
    assert error["phase"] == "forward" and error["module"].startswith("bert.encoder.layer.")
    assert error["where"] == f"train.per_device_train_batch_size = {ROWS}"
    fits = error["fits"]
    size = fits["train.per_device_train_batch_size"]
    assert size in {2**n for n in range(9)}
    assert size * fits["train.gradient_accumulation_steps"] == ROWS
    assert 0 < fits["peak_bytes"] < left * 2**20
    said = flat(ended)
    assert f"a batch of {size} fits" in said
    assert f"train.gradient_accumulation_steps={ROWS // size}" in said
    again, run, _ = short(
        "method=full",
        f"train.per_device_train_batch_size={size}",
        f"train.gradient_accumulation_steps={ROWS // size}",
        left=left,
    )
    assert again.code == 0, again.err
    assert run["memory"]["phases"]["backward"]["peak_bytes"] < left * 2**20


def test_backward_error_names_the_module_and_largest_tensors(short: Short) -> None:
    """Six wide activations are saved, and the backward pass needs two more at once."""
    for left in (340, 325, 355, 310, 370):  # the part that libraries need differs
        ended, run, _ = short("method=full", left=left)
        if ended.code == 3 and run["error"]["phase"] == "backward" and run["error"]["module"]:
            break
    error = checked(ended, run)
    assert error["phase"] == "backward" and error["module"].startswith("bert.")
    sizes = [tensor["bytes"] for tensor in error["tensors"]]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] >= WIDE_ONE
    saved = next(t for t in error["tensors"] if t["category"] == "saved_activations")
    assert math.prod(saved["shape"]) == ROWS * 11 * WIDE and saved["dtype"] == "float32"
    assert saved["of"].startswith("bert.encoder.layer.") and saved["bytes"] == WIDE_ONE
    assert "the largest tensors then:" in flat(ended)
    shape = " x ".join(map(str, saved["shape"]))
    assert f"44.0 MiB saved activations, {shape} float32, {saved['of']}" in flat(ended)


def test_evaluation_error_names_its_batch_size_and_keeps_checkpoints(short: Short) -> None:
    settings = ("method=full", "train.per_device_train_batch_size=4")
    for left in (60, 70, 50, 80):
        ended, run, folder = short(
            *settings,
            f"train.per_device_eval_batch_size={ROWS}",
            left=left,
            point="short-of-memory-later",
        )
        if ended.code == 3:
            break
    error = checked(ended, run)
    assert error["phase"] == "evaluate"
    assert error["where"] == f"train.per_device_eval_batch_size = {ROWS}"
    assert 0 < error["fits"]["train.per_device_eval_batch_size"] < ROWS
    assert "gradient_accumulation" not in error["fix"]
    assert [path.name for path in folder.glob("checkpoint-*")] == []  # the first was not due yet


def test_calibration_error_names_its_batch_size(short: Short) -> None:
    for left in LEFT:
        ended, run, folder = short("method.form=materialized", "method.density=0.01", left=left)
        if ended.code == 3:
            break
    error = checked(ended, run)
    assert error["phase"] == "calibrate"
    assert error["where"] == f"calibration.batch_size = {ROWS}"
    assert not (folder / "basis.safetensors").exists()


def test_failed_calibration_tries_smaller_batches(tmp_path: Path) -> None:
    """oneDNN's message for a failed allocation is recognised too."""
    settings = (
        f"model={base_folder(tmp_path / 'base')}",
        "task=csv",
        f"task.path={data_folder(tmp_path / 'data')}",
        "train.use_cpu=true",
        "calibration.batch_size=16",
        "calibration.warmup_steps=0",
        "calibration.decomposition=exact",
    )
    run = Run(load_recipe(None, settings), RunWriter(tmp_path), Observer())

    class FitsUpTo(RunCalibration):
        """A calibration that fails with larger batches."""

        largest = 5

        def calibrate(self, steps: range, batch_size: int | None = None, **rest: Any) -> Any:
            if (batch_size or self.batch_size) > self.largest:
                raise RuntimeError(ONEDNN_FAILURE)

    calibration = FitsUpTo(run, load(run))
    with pytest.raises(OutOfMemoryError) as found, calibration.memory_explained("calibrate"):
        calibration.calibrate(range(1))
    assert found.value.details["fits"]["calibration.batch_size"] == 4
    assert ONEDNN_FAILURE in found.value.what
    calibration.largest = 0
    with pytest.raises(OutOfMemoryError) as found, calibration.memory_explained("calibrate"):
        calibration.calibrate(range(1))
    assert found.value.details["fits"] is None
    assert str(found.value.fix).startswith("no batch fits: train.gradient_checkpointing=true")
