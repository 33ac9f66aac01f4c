"""Memory counts equal sums done by hand or figures from another source."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.checkpoint import checkpoint

from sparsegrad_cli.memory.meter import CATEGORIES, PHASES, MemoryMeter, make_meter

FLOAT = 4  # bytes
N, IN, OUT = 4, 6, 8
W_BYTES, B_BYTES = OUT * IN * FLOAT, OUT * FLOAT
X_BYTES, Y_BYTES = N * IN * FLOAT, N * OUT * FLOAT


def total(meter: MemoryMeter) -> int:
    return sum(meter.live().values())


def nbytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def peak_of(meter: MemoryMeter, name: str) -> tuple[int, dict[str, int]]:
    """Return a phase's peak and its non-zero categories."""
    peak = meter.peak(name)
    assert peak is not None
    assert sum(peak.categories.values()) == peak.peak_bytes
    return peak.peak_bytes, {k: v for k, v in peak.categories.items() if v}


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(IN, OUT)


@pytest.fixture
def meter() -> MemoryMeter:
    return make_meter("cpu")


# --- one linear layer


def test_forward_of_a_linear_layer_saves_its_input(layer: nn.Linear, meter: MemoryMeter) -> None:
    meter.watch(layer)
    x = torch.randn(N, IN)
    with meter.phase("forward"):
        loss = layer(x).sum()
    # The output is freed after the sum; the weight is saved too, but counts as a weight.
    _, categories = peak_of(meter, "forward")
    assert categories == {
        "weights": W_BYTES + B_BYTES,
        "saved_activations": X_BYTES,
        "other": Y_BYTES + FLOAT,
    }
    peak = meter.peak("forward")
    assert peak is not None and peak.saved_at_end == X_BYTES
    assert meter.live()["other"] == FLOAT
    del loss
    assert meter.live()["saved_activations"] == 0


def test_output_needed_by_backward_is_saved(layer: nn.Linear, meter: MemoryMeter) -> None:
    meter.watch(layer)
    x = torch.randn(N, IN)
    with meter.phase("forward"):
        out = layer(x).exp()  # saves its own result
        loss = (out * out).sum()  # saves the same storage again
    peak = meter.peak("forward")
    assert peak is not None and peak.saved_at_end == X_BYTES + Y_BYTES
    gc.disable()  # freeing the graph must not need the garbage collector
    del out, loss
    assert meter.live() == {
        **dict.fromkeys(CATEGORIES, 0),
        "weights": W_BYTES + B_BYTES,
        "other": X_BYTES,
    }
    gc.enable()


def test_backward_of_a_linear_layer(layer: nn.Linear, meter: MemoryMeter) -> None:
    meter.watch(layer)
    x = torch.randn(N, IN)
    with meter.phase("forward"):
        loss = layer(x).sum()
    with meter.phase("backward"):
        loss.backward()
    # Both gradients are allocated before the node frees x, and count as gradients at once.
    _, categories = peak_of(meter, "backward")
    assert categories == {
        "weights": W_BYTES + B_BYTES,
        "gradients": W_BYTES + B_BYTES,
        "saved_activations": X_BYTES,
        "other": 2 * FLOAT,  # the loss and its gradient
    }
    assert meter.live()["gradients"] == W_BYTES + B_BYTES
    layer.zero_grad(set_to_none=True)
    assert meter.live()["gradients"] == 0


def test_accumulation_adds_in_place(layer: nn.Linear, meter: MemoryMeter) -> None:
    meter.watch(layer)
    x = torch.randn(N, IN)
    for _ in range(3):
        with meter.phase("backward"):
            layer(x).sum().backward()
    assert meter.live()["gradients"] == W_BYTES + B_BYTES
    # The incoming gradient also counts as a gradient while it is added.
    _, categories = peak_of(meter, "backward")
    assert categories["gradients"] == 2 * (W_BYTES + B_BYTES)


def test_copied_gradient_freed_in_the_phase_is_counted(meter: MemoryMeter) -> None:
    model = nn.ParameterList([torch.ones(100), torch.ones(100)])
    meter.watch(model)
    with meter.phase("calibrate"):
        (
            model[0] + model[1]
        ).exp().sum().backward()  # both receive the same tensor, so one is copied
        assert meter.live()["gradients"] == 2 * 100 * FLOAT
        model.zero_grad()
    assert meter.live()["gradients"] == 0


def test_gradient_removed_by_a_hook_is_counted(layer: nn.Linear, meter: MemoryMeter) -> None:
    meter.watch(layer)
    layer.bias.requires_grad_(False)
    seen: list[int] = []

    def take(parameter: Tensor) -> None:
        assert parameter.grad is not None
        grad, parameter.grad = parameter.grad, None
        scratch = torch.ones(100) + grad.sum()
        seen.append(scratch.numel())

    layer.weight.register_post_accumulate_grad_hook(take)
    with meter.phase("calibrate"):
        layer(torch.randn(N, IN)).sum().backward()
    _, categories = peak_of(meter, "calibrate")
    assert seen == [100]
    assert categories["gradients"] == W_BYTES
    assert categories["other"] >= 2 * 100 * FLOAT
    assert meter.live()["gradients"] == 0


# --- categories


def test_unseen_tensors_are_counted_once_seen(meter: MemoryMeter, layer: nn.Linear) -> None:
    before = torch.zeros(1000)
    meter.watch(layer)
    with meter.phase("forward"):
        assert meter.live()["weights"] == W_BYTES + B_BYTES  # watched, so counted although unused
        assert meter.live()["other"] == 0
        after = before + 1
        assert meter.live()["other"] == 2 * 1000 * FLOAT
    assert after[0] == 1


def test_adam_state_is_counted_in_its_first_step(layer: nn.Linear, meter: MemoryMeter) -> None:
    optimizer = torch.optim.AdamW(layer.parameters(), foreach=False)
    meter.watch(layer, optimizer=optimizer)
    layer(torch.randn(N, IN)).sum().backward()
    with meter.phase("optimizer"):
        optimizer.step()
    state = 2 * (W_BYTES + B_BYTES) + 2 * FLOAT  # a step counter per parameter
    _, categories = peak_of(meter, "optimizer")
    assert categories["weights"] == categories["gradients"] == W_BYTES + B_BYTES
    assert meter.live()["optimizer_state"] == state
    # The bias's state does not exist yet at the peak of the weight's update.
    first_peak = categories["optimizer_state"]
    assert 2 * W_BYTES + FLOAT <= first_peak <= state
    with meter.phase("optimizer"):
        optimizer.step()
    assert peak_of(meter, "optimizer")[1]["optimizer_state"] == state


def test_bases_take_precedence_over_buffers(meter: MemoryMeter) -> None:
    model = nn.Sequential(nn.Linear(IN, OUT, bias=False))
    meter.watch(model)
    assert meter.live()["weights"] == W_BYTES
    q_in, q_out = torch.eye(IN), torch.eye(OUT)
    model.register_buffer("q_in", q_in)
    model[0] = nn.Linear(IN, 2 * OUT, bias=False)
    meter.watch(model, bases=[q_in, q_out])
    with meter.phase("evaluate"):
        pass
    _, categories = peak_of(meter, "evaluate")
    assert categories == {"weights": 2 * W_BYTES, "bases": nbytes((q_in, q_out))}
    del q_in, q_out
    assert meter.live()["bases"] == IN * IN * FLOAT  # the model still holds it


def test_weights_created_in_a_phase_are_weights_once_watched(meter: MemoryMeter) -> None:
    with meter.phase("load"):
        model = nn.Linear(IN, OUT)
    assert peak_of(meter, "load")[1]["other"] >= W_BYTES + B_BYTES
    before = peak_of(meter, "load")[0]
    meter.watch(model)
    peak, categories = peak_of(meter, "load")
    assert peak == before and categories["weights"] == W_BYTES + B_BYTES


def test_tied_weights_count_once(meter: MemoryMeter) -> None:
    first, second = nn.Linear(IN, IN, bias=False), nn.Linear(IN, IN, bias=False)
    second.weight = first.weight
    meter.watch(nn.ModuleList([first, second]))
    assert meter.live()["weights"] == IN * IN * FLOAT


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_lowers_saved_activations(reentrant: bool) -> None:
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(IN, IN), nn.GELU()) for _ in range(3))

    def saved(run: Callable[[nn.Module, Tensor], Tensor]) -> int:
        meter = MemoryMeter()
        meter.watch(blocks)
        x = torch.randn(N, IN, requires_grad=True)
        with meter.phase("forward"):
            for block in blocks:
                x = run(block, x)
            loss = x.sum()
        with meter.phase("backward"):
            loss.backward()
        blocks.zero_grad()
        assert meter.live()["saved_activations"] == 0
        peak = meter.peak("forward")
        assert peak is not None
        return peak.saved_at_end

    plain = saved(lambda block, x: block(x))
    assert plain == 3 * 2 * X_BYTES  # each block: the linear layer's input and GELU's
    inputs_only = saved(lambda block, x: checkpoint(block, x, use_reentrant=reentrant))
    # Recomputation also saves the random state, in uint8.
    assert inputs_only >= 3 * X_BYTES
    blocks_of_bytes = inputs_only - 3 * X_BYTES
    assert blocks_of_bytes % 3 == 0 and blocks_of_bytes <= 3 * torch.get_rng_state().nbytes


# --- a real architecture


def tiny_bert() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=20,
        )
    ).train()


def bert_batch() -> dict[str, Tensor]:
    ids = torch.arange(5 * 12).remainder(50).view(5, 12)
    labels = torch.tensor([0, 1, 0, 1, 1])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def measured_step(model: Any, optimizer: torch.optim.Optimizer) -> MemoryMeter:
    meter = make_meter("cpu")
    meter.watch(model, optimizer=optimizer)
    batch = bert_batch()
    torch.manual_seed(1)
    with meter.phase("forward"):
        loss = model(**batch).loss
    with meter.phase("backward"):
        loss.backward()
    with meter.phase("optimizer"):
        optimizer.step()
    return meter


def test_training_step_of_bert() -> None:
    model = tiny_bert()
    model.bert.embeddings.requires_grad_(False)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, foreach=False)
    meter = measured_step(model, optimizer)
    live = meter.live()
    assert live["weights"] == nbytes([*model.parameters(), *model.buffers()])
    assert live["gradients"] == nbytes(trainable)
    assert live["optimizer_state"] == 2 * nbytes(trainable) + len(trainable) * FLOAT
    assert live["saved_activations"] == live["other"] == live["bases"] == 0
    for name in ("forward", "backward", "optimizer"):
        assert peak_of(meter, name)[1]["weights"] == live["weights"]
    baseline = len({*model.parameters(), *model.buffers()})
    assert meter.tracked() == baseline + len(trainable) * (1 + 3)
    optimizer.state.clear()
    model.zero_grad()
    assert meter.tracked() == baseline
    del model, optimizer, trainable
    gc.collect()
    assert meter.tracked() == total(meter) == 0  # the meter keeps nothing alive


def test_counts_are_deterministic() -> None:
    reports = []
    for collector in (False, True):
        model = tiny_bert()
        before = gc.get_threshold()
        gc.set_threshold(1 if collector else 100_000)  # early and often, or never
        try:
            meter = measured_step(model, torch.optim.AdamW(model.parameters()))
        finally:
            gc.set_threshold(*before)
        report = meter.report().to_json()
        for phase in report["phases"].values():
            del phase["rss_bytes"]
        reports.append(report)
    assert reports[0] == reports[1]


def test_measuring_changes_no_value() -> None:
    plain, watched = tiny_bert(), tiny_bert()
    torch.manual_seed(1)
    plain(**bert_batch()).loss.backward()
    after = torch.get_rng_state()
    grads = []
    optimizer = torch.optim.AdamW(watched.parameters(), lr=0.0)
    measured_step(watched, optimizer)
    assert torch.equal(torch.get_rng_state(), after)
    for expected, found in zip(plain.parameters(), watched.parameters(), strict=True):
        if expected.grad is None:
            assert found.grad is None
        else:
            assert found.grad is not None and torch.equal(expected.grad, found.grad)
            grads.append(found.grad)
    assert len(grads) > 20


def test_counts_equal_the_profiler() -> None:
    """torch's profiler records every allocation of the CPU allocator."""
    model, batch = tiny_bert(), bert_batch()

    def recorded(run: Callable[[], Any]) -> tuple[Any, int, int]:
        with torch.profiler.profile(profile_memory=True) as profile:
            result = run()
        inner: Any = profile.profiler
        events = [e for e in inner.kineto_results.events() if e.name() == "[memory]"]
        now = peak = 0
        for event in sorted(events, key=lambda e: int(e.start_ns())):
            now += event.nbytes()
            peak = max(peak, now)
        return result, peak, now

    model(**batch).loss.backward()  # allocate what torch caches on the first call
    model.zero_grad()
    loss, forward_peak, forward_end = recorded(lambda: model(**batch).loss)
    _, backward_peak, backward_end = recorded(lambda: loss.backward())
    model.zero_grad()
    del loss

    meter = make_meter("cpu")
    meter.watch(model)
    with meter.phase("evaluate"):
        for tensor in batch.values():
            tensor.detach()  # seen now, so that the phases below add only what they allocate
    at_start = total(meter)
    with meter.phase("forward"):
        loss = model(**batch).loss
    between = total(meter)
    with meter.phase("backward"):
        loss.backward()
    # Equal except for a few scalars inside an operation.
    assert peak_of(meter, "forward")[0] - at_start == pytest.approx(forward_peak, abs=256)
    assert between - at_start == pytest.approx(forward_end, abs=256)
    assert peak_of(meter, "backward")[0] - between == pytest.approx(backward_peak, abs=256)
    assert total(meter) - between == pytest.approx(backward_end, abs=256)
    assert forward_peak > 50_000


# --- phases


def test_reference_cycles_count_until_the_phase_ends(meter: MemoryMeter) -> None:
    def cycle() -> None:
        holder: list[Any] = [torch.zeros(100)]
        holder.append(holder)

    with meter.phase("evaluate"):
        for _ in range(50):
            cycle()
        junk: list[list[int]] = [
            [] for _ in range(100_000)
        ]  # enough to trigger the collector if it were on
        assert not gc.isenabled() and len(junk) == 100_000
    assert gc.isenabled()
    assert peak_of(meter, "evaluate")[0] == 50 * 100 * FLOAT
    with meter.phase("forward"):
        pass
    assert peak_of(meter, "forward")[0] == total(meter) == 0


def test_earlier_garbage_is_not_counted(meter: MemoryMeter) -> None:
    gc.disable()  # only the meter collects, and it restores this setting
    try:
        with meter.phase("evaluate"):
            holder: list[Any] = [torch.zeros(100)]
            holder.append(holder)
            del holder
        assert total(meter) == 100 * FLOAT
        with meter.phase("forward"):
            pass
        assert peak_of(meter, "forward")[0] == 0
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_nothing_is_intercepted_outside_a_phase(layer: nn.Linear, meter: MemoryMeter) -> None:
    meter.watch(layer)
    with meter.phase("forward"):
        assert _get_current_dispatch_mode() is not None
    assert _get_current_dispatch_mode() is None
    known = meter.tracked()
    loss = layer(torch.randn(N, IN)).exp().sum()
    loss.backward()
    assert meter.tracked() == known and meter.live()["saved_activations"] == 0
    assert not layer.weight._backward_hooks and not layer.weight._post_accumulate_grad_hooks


def test_repeated_phase_keeps_the_larger_peak(meter: MemoryMeter) -> None:
    for size in (10, 30, 20):
        with meter.phase("calibrate"):
            torch.zeros(size)
    assert peak_of(meter, "calibrate")[0] == 30 * FLOAT


def test_error_ends_the_phase_and_is_measured(layer: nn.Linear, meter: MemoryMeter) -> None:
    meter.watch(layer)
    with pytest.raises(MemoryError), meter.phase("forward"):
        kept = torch.zeros(100)
        raise MemoryError
    assert peak_of(meter, "forward")[0] == kept.nbytes + W_BYTES + B_BYTES
    assert gc.isenabled() and _get_current_dispatch_mode() is None
    assert not layer.weight._backward_hooks


def test_invalid_phases_are_refused(meter: MemoryMeter) -> None:
    with pytest.raises(ValueError, match="forward, backward"), meter.phase("foward"):
        pass
    with meter.phase("load"), pytest.raises(RuntimeError, match="inside"), meter.phase("forward"):
        pass
    assert list(meter.report().phases) == ["load"]


def test_report_has_the_shape_of_run_json(layer: nn.Linear, meter: MemoryMeter) -> None:
    assert meter.report().phases == {} and meter.report().peak_phase is None
    meter.watch(layer)
    with meter.phase("backward"):
        layer(torch.randn(N, IN)).sum().backward()
    with meter.phase("load"):
        pass
    report = json.loads(json.dumps(meter.report().to_json()))
    assert set(report) == {"device", "how", "peak_bytes", "peak_phase", "phases"}
    assert list(report["phases"]) == [p for p in PHASES if p in ("load", "backward")]
    assert report["device"] == "cpu" and report["peak_phase"] == "backward"
    backward = report["phases"]["backward"]
    assert set(backward) == {"peak_bytes", "categories", "rss_bytes", "reserved_bytes"}
    assert tuple(backward["categories"]) == CATEGORIES
    assert report["peak_bytes"] == backward["peak_bytes"] == sum(backward["categories"].values())
    assert backward["rss_bytes"] > 10**7 and backward["reserved_bytes"] is None
