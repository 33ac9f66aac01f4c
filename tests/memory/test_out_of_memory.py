"""Out-of-memory errors name location, phase and largest tensors, with real failed allocations."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from support.tiny_models import batch, classifier
from torch import Tensor, nn

from sparsegrad_cli.error_mapping import is_out_of_memory, mapped_errors
from sparsegrad_cli.errors import OutOfMemoryError
from sparsegrad_cli.memory.meter import make_meter
from sparsegrad_cli.memory.out_of_memory import (
    CALIBRATION_KEY,
    Attempt,
    Phase,
    Trial,
    attempt,
    out_of_memory_explained,
    release,
)
from sparsegrad_cli.models.module_trace import trace_location
from sparsegrad_cli.recipe.load_recipe import load_recipe

FAR_TOO_MUCH = 2**55  # bytes; more than any machine has


class Hungry(nn.Module):
    """A module that allocates too much in its forward or backward pass."""

    def __init__(self, when: str) -> None:
        super().__init__()
        self.inner, self.when = nn.Linear(4, 4), when

    def forward(self, x: Tensor) -> Tensor:
        if self.when == "forward":
            torch.empty(FAR_TOO_MUCH, dtype=torch.uint8)
        y: Tensor = self.inner(x)
        if self.when == "backward" and y.requires_grad:
            y.register_hook(lambda grad: torch.empty(FAR_TOO_MUCH, dtype=torch.uint8))
        return y * 1


def tried(when: str, rows: int = 50) -> tuple[nn.Module, Attempt]:
    model = nn.Sequential(nn.Linear(300, 4), nn.Linear(4, 4), Hungry(when), nn.Linear(4, 1))
    meter = make_meter("cpu")
    meter.watch(model)
    x = torch.zeros(rows, 300)

    def work(phase: Phase) -> None:
        with phase("forward"):
            loss = model(x).sum()
        with phase("backward"):
            loss.backward()

    return model, attempt(model, meter, work)


@pytest.mark.parametrize(
    ("when", "phase", "module"), [("forward", "forward", "2"), ("backward", "backward", "2.inner")]
)
def test_failed_attempt_names_phase_and_module(when: str, phase: str, module: str) -> None:
    model, found = tried(when)
    assert not found.fits and (found.phase, found.module) == (phase, module)
    first = found.tensors[0]
    # x, (50, 300) float32, is the largest tensor and belongs to the caller.
    assert first.bytes == 50 * 300 * 4 and first.shape == [50, 300]
    assert found.peak_bytes >= first.bytes
    weight = next(tensor for tensor in found.tensors if tensor.of == "0.weight")
    assert (weight.bytes, weight.category) == (300 * 4 * 4, "weights")
    assert weight.dtype == "float32"
    for part in model.modules():
        assert not part._forward_hooks and not part._forward_pre_hooks


def test_successful_attempt_reports_its_peak() -> None:
    _, found = tried("never")
    assert found.fits and found.tensors == () and found.phase == "backward"
    small, large = tried("never", rows=10)[1], tried("never", rows=100)[1]
    assert large.peak_bytes - small.peak_bytes >= 90 * 300 * 4


def test_other_errors_are_not_out_of_memory() -> None:
    model = nn.Linear(2, 2)

    def work(phase: Phase) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        attempt(model, make_meter("cpu"), work)


def test_locations_in_a_real_model() -> None:
    model = classifier("bert")
    seen: list[str | None] = []
    with trace_location(model, seen.append):
        loss = model(**batch()).loss
        forward = len(seen)
        loss.backward()
    names = {name for name, _ in model.named_modules() if name}
    assert set(seen[:forward]) - {"", "BertForSequenceClassification"} <= names
    back = [name for name in seen[forward:] if name and name.endswith("output.dense")]
    assert [int(name.split(".")[3]) for name in back] == sorted(
        (int(name.split(".")[3]) for name in back), reverse=True
    )
    # The loss belongs to the whole model, the logits to their layer.
    assert seen[forward : forward + 2] == ["BertForSequenceClassification", "classifier"]


def test_gradients_and_state_are_named_by_their_parameter() -> None:
    model = nn.Linear(1000, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    meter = make_meter("cpu")
    meter.watch(model, optimizer=optimizer)
    with meter.phase("backward"):
        model(torch.ones(1, 1000)).sum().backward()
    with meter.phase("optimizer"):
        optimizer.step()
    named = {(t.category, t.of) for t in meter.largest(20) if t.bytes == 4000}
    assert named >= {
        ("weights", "weight"),
        ("gradients", "weight"),
        ("optimizer_state", "weight, exp_avg"),
        ("optimizer_state", "weight, exp_avg_sq"),
    }
    sizes = [tensor.bytes for tensor in meter.largest(20)]
    assert sizes == sorted(sizes, reverse=True) and meter.largest(2) == meter.largest(20)[:2]


def test_forgetting_an_error_frees_its_frames() -> None:
    held: list[weakref.ref[Tensor]] = []

    def fail() -> None:
        large = torch.zeros(1000)
        held.append(weakref.ref(large))
        try:
            torch.empty(FAR_TOO_MUCH, dtype=torch.uint8)
        except RuntimeError as inner:
            raise ValueError("and so on") from inner

    kept: list[BaseException] = []
    try:
        fail()
    except ValueError as error:
        kept.append(error)
    gc.collect()
    assert held[0]() is not None
    release(kept[0])
    assert held[0]() is None


def caught(bytes_asked: int) -> RuntimeError:
    with pytest.raises(RuntimeError) as error:
        torch.empty(bytes_asked, dtype=torch.uint8)
    return error.value


def test_what_counts_as_out_of_memory() -> None:
    assert is_out_of_memory(caught(FAR_TOO_MUCH))
    with pytest.raises(MemoryError) as error:
        bytearray(2**62)
    assert is_out_of_memory(error.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(OSError(12, "Cannot allocate memory"))
    assert not is_out_of_memory(OSError(28, "No space left on device"))
    assert not is_out_of_memory(ValueError("can't allocate memory"))
    primitive = RuntimeError("could not create a primitive")
    assert is_out_of_memory(primitive)
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


def test_out_of_memory_outside_a_run_is_our_error() -> None:
    with (
        pytest.raises(OutOfMemoryError, match="you tried to allocate") as error,
        mapped_errors(memory=("--batch-size", "a smaller one")),
    ):
        torch.empty(FAR_TOO_MUCH, dtype=torch.uint8)
    assert error.value.where == "--batch-size" and error.value.exit_code == 3


def explained(
    phase: str, *settings: str, trials: dict[str, Trial] | None = None
) -> OutOfMemoryError:
    """The error of a failed allocation in this phase of a recipe."""
    recipe = load_recipe(None, settings).recipe
    with (
        pytest.raises(OutOfMemoryError) as error,
        out_of_memory_explained(recipe, phase, trials=trials),
    ):
        torch.empty(FAR_TOO_MUCH, dtype=torch.uint8)
    return error.value


@pytest.mark.parametrize(
    ("settings", "fix"),
    [
        (("method=full",), "a smaller model"),
        (("method=lora",), "a smaller method.rank or a smaller model"),
        (("method.form=materialized", "calibration.basis_per=kind"), "a smaller model"),
        ((), "calibration.basis_per=kind, a smaller method.rank or a smaller model"),
    ],
)
def test_prepare_suggests_settings_that_the_method_has(settings: tuple[str, ...], fix: str) -> None:
    error = explained("prepare", *settings)
    assert (error.where, error.fix) == ("method", fix)


def test_a_failed_search_for_a_batch_is_one_line_of_the_message() -> None:
    def fail(size: int) -> Attempt:
        raise RuntimeError("can't start new thread\nand more")

    error = explained("calibrate", trials={"calibrate": Trial(CALIBRATION_KEY, 8, fail)})
    assert error.more == (
        "the search for a batch that fits failed: RuntimeError: can't start new thread",
    )
    assert error.where == "calibration.batch_size = 8" and error.details["fits"] is None
    assert str(error.fix).startswith("a smaller calibration.batch_size; ")
