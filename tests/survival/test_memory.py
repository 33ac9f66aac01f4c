"""Memory that really runs out: an address space with a limit, in a process of its own."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import Ended, Killer
from little import base_folder, data_folder, sentences
from surviving import flat, record
from tiny import one_thread

from sparsegrad_cli.calibration.calibrate_run import CalibrationSession
from sparsegrad_cli.errors import OutOfMemoryError
from sparsegrad_cli.progress import Observer
from sparsegrad_cli.recipe.load_recipe import load_recipe
from sparsegrad_cli.records.writer import RunWriter

ROWS, WIDE = 512, 2048  # an activation of the wide layer: 512 x 11 x 2048 x 4 bytes, 44 MiB
WIDE_ONE = ROWS * 11 * WIDE * 4
# MiB, of which three do not fit and a small batch does. What libraries take of it is theirs to say,
# and oneDNN's own words for it are taken for it only where a smaller batch fits: so look again.
LEFT = (100, 110, 120, 90, 130)
WORDS = "could not create a primitive"  # oneDNN's
FAR_TOO_MUCH = 2**55  # bytes; every allocator says so
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


def checked(ended: Ended, run: dict[str, Any]) -> dict[str, Any]:
    """Exit 3 and the status; the error's own block."""
    assert ended.code == 3, ended.err
    assert run["status"] == "out_of_memory" and "Traceback" not in ended.err
    error: dict[str, Any] = run["error"]
    assert f"memory ran out in {error['what'].partition(' in ')[2]}" in flat(ended)
    return error


def test_forward_names_the_module_and_what_fits_does_fit(short: Short) -> None:
    """The wide activation is what is asked for; where a small one came to the end, look again."""
    for left in LEFT:
        ended, run, _ = short("method=full", left=left)
        if ended.code == 3 and run["error"]["asked_bytes"] == WIDE_ONE:
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


def test_backward_names_module_and_largest_tensors(short: Short) -> None:
    """Six wide activations are kept, the backward pass needs two more at once."""
    for left in (340, 325, 355, 310, 370):  # what libraries take of it is theirs to say
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


def test_evaluation_blames_its_own_batch_and_keeps_the_checkpoints(short: Short) -> None:
    settings = ("method=full", "train.per_device_train_batch_size=4")
    for left in (60, 70, 50, 80):
        ended, run, folder = short(
            *settings,
            f"train.per_device_eval_batch_size={ROWS}",
            left=left,
            moment="short-of-memory-later",
        )
        if ended.code == 3:
            break
    error = checked(ended, run)
    assert error["phase"] == "evaluate"
    assert error["where"] == f"train.per_device_eval_batch_size = {ROWS}"
    assert 0 < error["fits"]["train.per_device_eval_batch_size"] < ROWS
    assert "gradient_accumulation" not in error["fix"]
    assert [path.name for path in folder.glob("checkpoint-*")] == []  # the first was not due yet


def test_calibration_blames_its_own_batch(short: Short) -> None:
    for left in LEFT:
        ended, run, folder = short("method.form=materialized", "method.density=0.01", left=left)
        if ended.code == 3:
            break
    error = checked(ended, run)
    assert error["phase"] == "calibrate"
    assert error["where"] == f"calibration.batch_size = {ROWS}"
    assert not (folder / "basis.safetensors").exists()


@pytest.fixture(scope="module")
def calibrating(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[Callable[[int], None]], None]:
    """A calibration with batches of 16 whose step does what is given, in a session."""
    place = tmp_path_factory.mktemp("calibrating")
    settings = (
        f"model={base_folder(place / 'base')}",
        "task=csv",
        f"task.path={data_folder(place / 'data')}",
        "train.use_cpu=true",
        "calibration.batch_size=16",
        "calibration.warmup_steps=0",
        "calibration.decomposition=exact",
    )
    session = CalibrationSession(load_recipe(None, settings), RunWriter(place), Observer())
    session.load()

    def calibrate(one_step: Callable[[int], None]) -> None:
        session.known.at, session.known.calibration_batch = "calibrate", 16
        session.known.calibrate = one_step
        with session.explained():
            one_step(16)

    return calibrate


def test_words_that_may_mean_it_count_if_a_smaller_batch_fits(calibrating: Any) -> None:
    """oneDNN's are the same where a CPU cannot do something at all."""

    def step(largest: int) -> Callable[[int], None]:
        """No batch beyond ``largest`` finds room."""

        def one_step(size: int) -> None:
            if size > largest:
                raise RuntimeError(WORDS)

        return one_step

    with pytest.raises(OutOfMemoryError) as found:
        calibrating(step(5))
    assert found.value.details["fits"]["calibration.batch_size"] == 4
    assert WORDS in found.value.what
    with pytest.raises(RuntimeError, match=WORDS):
        calibrating(step(0))


@pytest.mark.parametrize("first", ["allocation", "onednn"])
def test_where_memory_is_short_a_batch_counts_that_fits_without_onednn(
    calibrating: Any, first: str
) -> None:
    """oneDNN finds no room for its code in what was freed, however small the batch is."""
    done: list[int] = []

    def one_step(size: int) -> None:
        done.append(size)
        if torch.backends.mkldnn.enabled and (len(done) > 1 or first == "onednn"):
            raise RuntimeError(WORDS)
        if size > 5:
            torch.empty(FAR_TOO_MUCH, dtype=torch.uint8)

    with pytest.raises(OutOfMemoryError) as found:
        calibrating(one_step)
    assert found.value.details["fits"]["calibration.batch_size"] == 4
    assert torch.backends.mkldnn.enabled


def test_what_onednn_cannot_do_at_any_size_is_no_lack_of_memory(calibrating: Any) -> None:
    def one_step(size: int) -> None:
        if torch.backends.mkldnn.enabled:
            raise RuntimeError(WORDS)

    with pytest.raises(RuntimeError, match=WORDS) as found:
        calibrating(one_step)
    assert not isinstance(found.value, OutOfMemoryError)
