"""Calibration passes as training makes them: recomputed blocks, autocast, float16's loss scale."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch
from support.tiny_models import (
    HIDDEN,
    INNER,
    batch,
    batches,
    calibrated,
    classifier,
    found_by,
    one_thread,
    snapshot,
    targets_of,
    three_batches,
)
from torch import Tensor, nn

from sparsegrad_cli.calibration.calibrate import calibrate
from sparsegrad_cli.calibration.gradients import (
    as_in_training,
    gradient_step,
    gradients_only,
    tokens_only,
)
from sparsegrad_cli.calibration.warmup import warmed_head
from sparsegrad_cli.memory.meter import MemoryMeter
from sparsegrad_cli.models.memory_savers import save_memory
from sparsegrad_cli.models.targets import Target, head_parameters
from sparsegrad_cli.numerics.hosvd import GramStream, Stream
from sparsegrad_cli.numerics.seeding import temporary_seed
from sparsegrad_cli.recipe.schema import CalibrationSection, TrainSection

RECOMPUTED = TrainSection(gradient_checkpointing=True)
BF16 = TrainSection(bf16=True)
FP16 = TrainSection(fp16=True)
Pair = tuple[Tensor, ...]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def collected(
    model: nn.Module, source: str, train: TrainSection | None, inputs: dict[str, Tensor]
) -> dict[str, list[Pair]]:
    """Target -> dL/dW, or (dL/dy, x), one for each time that they were handed over."""
    targets = targets_of(model)
    found: dict[str, list[Pair]] = {target.name: [] for target in targets}

    def gradient(target: Target, grad_OI: Tensor) -> None:
        found[target.name].append((grad_OI.clone(),))

    def tokens(target: Target, g_NO: Tensor, x_NI: Tensor) -> None:
        found[target.name].append((g_NO.clone(), x_NI.clone()))

    with as_in_training(model, train) as scale, temporary_seed(3):
        hooks = (
            gradients_only(model, targets, gradient, scale=scale)
            if source == "batch"
            else tokens_only(model, targets, tokens, scale=scale)
        )
        with hooks:
            gradient_step(model, inputs, 1, scale=scale)
    return found


@pytest.mark.parametrize("source", ["batch", "token"])
@pytest.mark.parametrize("architecture", ["bert", "llama", "gpt2", "deberta-v3"])
@pytest.mark.parametrize("recompute", ["none", "activation"])
def test_recomputed_blocks_give_the_same_gradients_once(
    source: str, architecture: str, recompute: str
) -> None:
    """With dropout, to the last bit of float64; nothing is counted again in the recomputation."""
    model = classifier(architecture, dtype=torch.float64)
    plain = collected(model, source, None, batch())
    save_memory(model, targets_of(model), recompute)
    lean = collected(model, source, RECOMPUTED, batch())
    assert [len(pairs) for pairs in lean.values()] == [1] * len(targets_of(model))
    for name, pairs in plain.items():
        assert all(map(torch.equal, pairs[0], lean[name][0])), name


@pytest.mark.parametrize("source", ["batch", "token"])
def test_calibration_keeps_the_inputs_of_blocks_alone(source: str) -> None:
    peaks = []
    for train in (None, RECOMPUTED):
        model, meter = classifier("llama", num_hidden_layers=8), MemoryMeter()
        meter.watch(model)

        def phase(meter: MemoryMeter = meter) -> AbstractContextManager[Any]:
            return meter.phase("calibrate")

        section = CalibrationSection(steps=1, source=source)  # type: ignore[arg-type]
        one = batch(size=64, length=30)
        calibrate(
            model,
            targets_of(model),
            partial(iter, [one]),
            section,
            seed=0,
            train=train,
            meter=phase,
        )
        peak = meter.peak("calibrate")
        assert peak is not None
        peaks.append(peak.peak_bytes - peak.categories["weights"])
    assert peaks[1] < 0.6 * peaks[0]


@pytest.mark.parametrize("source", ["batch", "token"])
def test_under_autocast_they_are_trainings_own_gradients(source: str) -> None:
    """Against the forward pass that accelerate makes of the same model."""
    from accelerate.utils.operations import convert_outputs_to_fp32

    model, inputs = classifier(), batch()
    found = collected(model, source, BF16, inputs)
    trained: Any = copy.deepcopy(model).train()
    targets = targets_of(trained)
    for parameter in trained.parameters():
        parameter.requires_grad_(False)
    for target in targets:
        trained.get_submodule(target.name).weight.requires_grad_(True)
    trained.forward = convert_outputs_to_fp32(
        torch.autocast("cpu", torch.bfloat16)(trained.forward)
    )
    with temporary_seed(3):
        trained(**inputs).loss.backward()
    for target in targets:
        gradient = trained.get_submodule(target.name).weight.grad
        got = found[target.name][0]
        if source == "token":
            assert {tensor.dtype for tensor in got} == {torch.bfloat16}
            got = ((got[0].T @ got[1]).float(),)
        assert torch.equal(got[0], gradient)


def test_float16_gradients_do_not_underflow() -> None:
    """Of a loss so small that its float16 gradients would be zero."""
    model = classifier(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    with torch.no_grad():
        model.get_submodule("classifier").weight.mul_(1e-3)  # type: ignore[operator]
    exact = collected(model, "token", None, batch())
    half = collected(model, "token", FP16, batch())
    for name, ((g_NO, _),) in half.items():
        expected = exact[name][0][0]
        assert g_NO.dtype == torch.float32
        torch.testing.assert_close(
            g_NO, expected, rtol=0.05, atol=0.02 * float(expected.abs().max())
        )


@pytest.mark.parametrize("train", [RECOMPUTED, BF16, FP16])
def test_the_model_comes_out_as_it_went_in(train: TrainSection) -> None:
    model = classifier()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="stop"), as_in_training(model, train):
        assert train is not RECOMPUTED or model.is_activation_checkpointing
        raise RuntimeError("stop")
    calibrated(model, targets_of(model), steps=1, source="token")
    assert "forward" not in vars(model) and not model.is_activation_checkpointing
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_the_heads_warm_up_autocasts_and_is_measured() -> None:
    entered: list[int] = []

    def meter() -> AbstractContextManager[Any]:
        entered.append(1)
        return one_thread()

    heads = []
    for train in (None, BF16, FP16):
        model = classifier()
        warm = warmed_head(
            model, three_batches, steps=3, learning_rate=1e-2, seed=0, train=train, meter=meter
        )
        with warm:
            heads.append(torch.cat([p.detach().flatten() for p in head_parameters(model).values()]))
    assert len(entered) == 3 * 3  # The third step has the last forward pass.
    for half in heads[1:]:
        assert not torch.equal(heads[0], half)
        torch.testing.assert_close(half, heads[0], rtol=0, atol=2e-2)


def test_exact_grams_are_freed_as_their_bases_are_made() -> None:
    model = classifier()
    targets, rank = targets_of(model), 4
    earlier: list[weakref.ref[Tensor]] = []

    def watch(key: str, stream: Stream) -> None:
        assert isinstance(stream, GramStream)
        assert not any(gram() is not None for gram in earlier)
        earlier.append(weakref.ref(stream.gram_in))

    settings = CalibrationSection(steps=1)
    found = calibrate(model, targets, batches, settings, seed=0, rank=rank, on_stream=watch)
    assert len(earlier) == len(targets)
    whole = found_by(model, targets, batches, settings, seed=0, rank=rank, whole=True)
    for target in targets:
        basis, every = found.bases[target.name], whole.bases[target.name]
        assert basis.q_in.shape == (target.in_features, rank)
        assert every.q_in.shape == (target.in_features, target.in_features)
        assert torch.equal(basis.q_in, every.q_in[:, :rank])
        # Of a share of energy, the rank is told from all singular values.
        assert torch.equal(basis.singular_in, every.singular_in)
    assert found.stream_bytes == 4 * len(targets) * (HIDDEN**2 + INNER**2)
