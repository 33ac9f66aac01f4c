"""Memory that really runs out: an address space with a limit, in a process of its own."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from killing import Ended, Killer
from little import base_folder, sentences
from surviving import record
from tiny import one_thread

ROWS, WIDE = 512, 1024  # an activation of the wide layer: 512 x 11 x 1024 x 4 bytes, 22 MiB
WIDE_ONE = ROWS * 11 * WIDE * 4
Short = Callable[..., tuple[Ended, dict[str, Any], Path]]


@pytest.fixture(scope="module")
def short(killer: Killer, tmp_path_factory: pytest.TempPathFactory) -> Short:
    """``short("full", 100)``: a run with 100 MiB of address space left once it has loaded."""
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
        "calibration.steps=1",
        "calibration.warmup_steps=0",
    )
    numbers = iter(range(100))

    def run(
        *settings: str, left: int, moment: str = "short-of-memory"
    ) -> tuple[Ended, dict[str, Any], Path]:
        folder = place / f"run-{next(numbers)}"
        command = ("train", *common, *settings, "-o", str(folder))
        ended = killer.run(*command, moment=moment, count=left)
        return ended, record(folder), folder

    return run


def flat(ended: Ended) -> str:
    return " ".join(ended.err.replace("│", " ").split())


def checked(ended: Ended, run: dict[str, Any]) -> dict[str, Any]:
    """Exit 3 and the status; the error's own block."""
    assert ended.code == 3, ended.err
    assert run["status"] == "out_of_memory" and "Traceback" not in ended.err
    error: dict[str, Any] = run["error"]
    assert f"memory ran out in {error['what'].partition(' in ')[2]}" in flat(ended)
    return error


def test_forward_names_the_module_and_what_fits_does_fit(short: Short) -> None:
    ended, run, _ = short("method=full", left=30)
    error = checked(ended, run)
    assert error["phase"] == "forward" and error["module"].startswith("bert.encoder.layer.")
    assert error["asked_bytes"] == WIDE_ONE
    assert error["where"] == f"train.per_device_train_batch_size = {ROWS}"
    fits = error["fits"]
    size = fits["train.per_device_train_batch_size"]
    assert size in {2**n for n in range(9)}
    assert size * fits["train.gradient_accumulation_steps"] == ROWS
    assert 0 < fits["peak_bytes"] < 30 * 2**20
    said = flat(ended)
    assert f"a batch of {size} fits" in said
    assert f"train.gradient_accumulation_steps={ROWS // size}" in said
    again, run, _ = short(
        "method=full",
        f"train.per_device_train_batch_size={size}",
        f"train.gradient_accumulation_steps={ROWS // size}",
        left=30,
    )
    assert again.code == 0, again.err
    assert run["memory"]["phases"]["backward"]["peak_bytes"] < 30 * 2**20


def test_backward_names_module_and_largest_tensors(short: Short) -> None:
    """In LoRA's frozen layers, the forward pass keeps little: its backward pass needs more."""
    for left in range(200, 600, 40):
        ended, run, _ = short("method=lora", left=left)
        if ended.code == 3 and run["error"]["phase"] == "backward":
            break
    error = checked(ended, run)
    assert error["phase"] == "backward" and error["module"].startswith("bert.")
    sizes = [tensor["bytes"] for tensor in error["tensors"]]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] >= WIDE_ONE
    first = error["tensors"][0]
    assert first["category"] == "saved_activations" and first["shape"] == [ROWS, 11, WIDE]
    assert first["of"].startswith("bert.encoder.layer.") and first["dtype"] == "float32"
    assert "the largest tensors then:" in flat(ended)
    assert f"saved activations, {ROWS} x 11 x {WIDE} float32" in flat(ended)


def test_evaluation_blames_its_own_batch_and_keeps_the_checkpoints(short: Short) -> None:
    settings = ("method=full", "train.per_device_train_batch_size=4")
    ended, run, folder = short(
        *settings,
        f"train.per_device_eval_batch_size={ROWS}",
        left=20,
        moment="short-of-memory-later",
    )
    error = checked(ended, run)
    assert error["phase"] == "evaluate"
    assert error["where"] == f"train.per_device_eval_batch_size = {ROWS}"
    assert 0 < error["fits"]["train.per_device_eval_batch_size"] < ROWS
    assert "gradient_accumulation" not in error["fix"]
    assert [path.name for path in folder.glob("checkpoint-*")] == []  # the first was not due yet


def test_calibration_blames_its_own_batch(short: Short) -> None:
    settings = ("method.form=materialized", "method.density=0.01")
    ended, run, folder = short(*settings, "calibration.source=original", left=400)
    assert ended.code in (0, 3)  # without gradients there is nothing of the batch's size
    ended, run, folder = short(*settings, left=130)
    error = checked(ended, run)
    assert error["phase"] == "calibrate"
    assert error["where"] == f"calibration.batch_size = {ROWS}"
    assert not (folder / "basis.safetensors").exists()
