"""One contract, held by every method and form."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from support.checkpoint_files import save
from support.tiny_models import (
    BLOCKS,
    CALIBRATED,
    HIDDEN,
    INNER,
    METHODS,
    Tuned,
    batch,
    classifier,
    logits,
    snapshot,
    weight_of,
)
from torch import Tensor

from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.io.atomic import read_tensors, save_tensors
from sparsegrad_cli.methods.implementation import load_by_name, trainable_state
from sparsegrad_cli.methods.sparse_settings import SparseSettings
from sparsegrad_cli.numerics.rotation import to_core
from sparsegrad_cli.numerics.seeding import temporary_seed
from sparsegrad_cli.recipe.schema import TrainSection
from sparsegrad_cli.training.checkpoint import load_optimizer, load_random

every_method = pytest.mark.parametrize("name", METHODS)
both_scopes = pytest.mark.parametrize("scope", ["head", "rest"])
linear_and_conv1d = pytest.mark.parametrize("architecture", ["bert", "gpt2"])
# nn.Linear and Conv1D, the head alone and the rest too: each once.
both_layers_and_scopes = pytest.mark.parametrize(
    ("architecture", "scope"), [("bert", "head"), ("gpt2", "rest")]
)
# Methods that step some parameters of a matrix, the same number in every batch.
CHOOSING = [
    name
    for name, (settings, _) in METHODS.items()
    if isinstance(settings, SparseSettings) and name not in ("meprop-rows", "core-dense")
]
WHOLE = [name for name in METHODS if name not in CHOOSING and name != "meprop-rows"]

TARGET_LAYERS = {
    "bert": [
        f"bert.encoder.layer.{n}.{kind}.dense"
        for n in range(BLOCKS)
        for kind in ("intermediate", "output")
    ],
    "gpt2": [f"transformer.h.{n}.mlp.{kind}" for n in range(BLOCKS) for kind in ("c_fc", "c_proj")],
}
HEAD = {"bert": {"classifier.weight", "classifier.bias"}, "gpt2": {"score.weight"}}
TARGET_ENTRIES = 2 * BLOCKS * HIDDEN * INNER


def required_names(tuned: Tuned) -> set[str]:
    return {name for name, p in tuned.model.named_parameters() if p.requires_grad}


def may_change(tuned: Tuned, name: str, architecture: str, scope: str) -> set[str]:
    """By hand: the head, the adapted matrices, and under ``rest`` all but the base matrices."""
    layers = TARGET_LAYERS[architecture]
    if name == "lora":
        matrices = {f"{layer}.lora_{part}.default.weight" for layer in layers for part in "AB"}
        base = {f"{layer}.base_layer.weight" for layer in layers}
    elif name.startswith("core"):
        matrices = {f"{layer}.sparsegrad_values.default" for layer in layers}
        base = {f"{layer}.base_layer.weight" for layer in layers}
    elif f"{layers[0]}.weight" in required_names(tuned):
        matrices, base = {f"{layer}.weight" for layer in layers}, set()
    else:  # of another method it is known only that it trains something of each target
        inside = {n: p for n, p in tuned.model.named_parameters() if n.startswith(tuple(layers))}
        inside = {n: p for n, p in inside.items() if not n.endswith("bias")}
        matrices = {n for n, p in inside.items() if p.requires_grad}
        base = inside.keys() - matrices
        assert all(any(n.startswith(layer) for n in matrices) for layer in layers)
    if scope == "rest":
        return {n for n, _ in tuned.model.named_parameters()} - base
    return HEAD[architecture] | matrices


@every_method
@both_layers_and_scopes
def test_what_the_model_computes_is_unchanged_at_the_start(
    name: str, architecture: str, scope: str
) -> None:
    before = logits(classifier(architecture))
    tuned = Tuned(name, architecture, scope=scope)
    after = tuned.logits()
    if changed := tuned.method.settings.starts_changed:
        assert not torch.equal(after, before)
        assert changed in tuned.prepared.counts.note
        return
    if name.startswith("rotated"):
        assert float((after - before).abs().max() / before.abs().max()) < 1e-6
    else:
        assert torch.equal(after, before)


@every_method
@both_layers_and_scopes
def test_frozen_parameters_are_bitwise_frozen_and_the_others_move(
    name: str, architecture: str, scope: str
) -> None:
    tuned = Tuned(name, architecture, scope=scope, train=None)
    allowed = may_change(tuned, name, architecture, scope)
    assert required_names(tuned) == allowed
    before = snapshot(tuned.model)
    tuned.steps(5)
    after = snapshot(tuned.model)
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed <= allowed
    always = may_change(tuned, name, architecture, "head")
    assert always <= changed, "targets and head do move"
    if scope == "rest":
        prefix = TARGET_LAYERS[architecture][0]
        biases = {f"{prefix}.base_layer.bias", f"{prefix}.bias"}
        assert biases & changed, "biases of targets belong to the rest"


@pytest.mark.parametrize("name", ["lora", "full", "meprop-entries", "core-static"])
def test_scope_pooler_trains_the_pooler_too_and_counts_it(name: str) -> None:
    tuned = Tuned(name, scope="pooler", train=None)
    pooler = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert required_names(tuned) == may_change(tuned, name, "bert", "head") | pooler
    assert tuned.prepared.counts.trainable_rest == HIDDEN * HIDDEN + HIDDEN
    before = snapshot(tuned.model)
    tuned.steps(1)
    after = snapshot(tuned.model)
    assert all(not torch.equal(before[name], after[name]) for name in pooler)


def test_scope_pooler_needs_a_pooler() -> None:
    with pytest.raises(UsageError, match="GPT2ForSequenceClassification has none"):
        Tuned("lora", "gpt2", scope="pooler")


@every_method
def test_optimizer_is_the_one_of_the_recipe_or_it_is_refused(name: str) -> None:
    """A rate of the head has an effect in any case."""
    settings = METHODS[name][0]
    train = TrainSection(optim="sgd", learning_rate=1e-2, head_learning_rate=0.5)
    tuned = Tuned(name, train=train)
    if settings.optimizer_refusal() is None:
        assert type(tuned.optimizer) is torch.optim.SGD
    head = {id(p) for n, p in tuned.model.named_parameters() if n in HEAD["bert"]}
    rates = {id(p): g["lr"] for g in tuned.optimizer.param_groups for p in g["params"]}
    assert {rates[p] for p in head} == {0.5}
    assert {rate for p, rate in rates.items() if p not in head} == {1e-2}


@every_method
@linear_and_conv1d
def test_loss_falls(name: str, architecture: str) -> None:
    tuned = Tuned(name, architecture)
    inputs = batch(seed=3)
    losses = [tuned.step(inputs) for _ in range(50)]
    assert losses[-1] < 0.85 * losses[0]


@every_method
@both_layers_and_scopes
def test_adapter_goes_back_onto_a_fresh_model(
    name: str, architecture: str, scope: str, tmp_path: Path
) -> None:
    tuned = Tuned(name, architecture, scope=scope)
    start = tuned.logits()
    tuned.steps(5)
    path = tmp_path / "adapter.safetensors"
    save_tensors(path, tuned.method.adapter_tensors(tuned.model), {"method": name})
    fresh = Tuned(name, architecture, scope=scope)
    assert torch.equal(fresh.logits(), start)
    fresh.method.load_adapter(fresh.model, read_tensors(path))
    expected = tuned.logits()
    assert not torch.allclose(expected, start, atol=1e-3), "training changed something"
    if name.startswith("materialized"):  # rotated there and back in float32
        torch.testing.assert_close(fresh.logits(), expected, atol=2e-5, rtol=0)
    else:
        assert torch.equal(fresh.logits(), expected)


@every_method
def test_an_adapter_of_another_model_is_refused(name: str) -> None:
    tuned, other = Tuned(name), Tuned(name, "gpt2")
    tuned.steps(1)
    other.steps(1)
    with pytest.raises(KeyError):
        tuned.method.load_adapter(tuned.model, other.method.adapter_tensors(other.model))


@every_method
def test_adapter_before_training_is_the_base_model(name: str) -> None:
    tuned, fresh = Tuned(name), Tuned(name)
    start = fresh.logits()
    fresh.method.load_adapter(fresh.model, tuned.method.adapter_tensors(tuned.model))
    torch.testing.assert_close(fresh.logits(), start, atol=1e-6, rtol=0)


@every_method
def test_same_seed_twice_is_bitwise_the_same(name: str) -> None:
    runs = []
    for _ in range(2):
        torch.rand(3)  # whatever was drawn before does not matter
        CALIBRATED.clear()
        tuned = Tuned(name, scope="rest")
        runs.append((tuned.steps(4), snapshot(tuned.model)))
    (losses, weights), (again, weights_again) = runs
    assert losses == again
    assert all(torch.equal(weights[n], weights_again[n]) for n in weights)


@every_method
def test_instances_alive_at_once_do_not_influence_each_other(name: str) -> None:
    alone = Tuned(name)
    for number in range(4):
        alone.steps(1, seed=number, start=number)
    mixed = Tuned(name)
    others = [Tuned(name, seed=9), Tuned(name, "gpt2", seed=8), Tuned("materialized-kind")]
    for number in range(4):
        for other in others:
            other.steps(1)
        mixed.steps(1, seed=number, start=number)
    expected, got = snapshot(alone.model), snapshot(mixed.model)
    assert all(torch.equal(expected[n], got[n]) for n in expected)


def changed_entries(tuned: Tuned, inputs: dict[str, Tensor]) -> dict[str, int]:
    """Per target: entries of the weight (or core) that one step changed, measured."""
    tuned.train = tuned.train.model_copy()
    kept = {t.name: weight_of(tuned.model, t).detach().clone() for t in tuned.targets}
    tuned.step(inputs)
    found = {}
    for target in tuned.targets:
        difference = weight_of(tuned.model, target).detach() - kept[target.name]
        if getattr(tuned.method.settings, "form", None) == "materialized":
            if target.transposed:
                difference = difference.T
            basis = tuned.method._bases[target.name]
            # the first step of an entry is lr: 1e-2; the rest of the core moves by rounding only
            found[target.name] = int((to_core(difference, basis).abs() > 5e-3).sum())
        else:
            found[target.name] = int((difference != 0).sum())
    return found


@pytest.mark.parametrize("name", CHOOSING)
@linear_and_conv1d
def test_counts_are_the_entries_that_one_step_changes(name: str, architecture: str) -> None:
    tuned = Tuned(name, architecture)
    counts = tuned.prepared.counts
    expected = {count.target.name: count.entries for count in counts.targets}
    assert list(expected) == TARGET_LAYERS[architecture]
    assert changed_entries(tuned, batch()) == expected
    share = 0.1 if "unified" in name else 0.05
    if "unified" in name:
        by_hand = {"up": round(share * INNER) * HIDDEN, "down": round(share * HIDDEN) * INNER}
        assert sorted(set(expected.values())) == sorted(set(by_hand.values()))
    else:
        assert set(expected.values()) == {round(share * HIDDEN * INNER)}
        assert counts.requested == counts.trainable_targets


def test_counts_of_meprop_rows_are_per_example() -> None:
    tuned = Tuned("meprop-rows")
    expected = {c.target.name: c.entries for c in tuned.prepared.counts.targets}
    assert changed_entries(tuned, batch(size=1, length=1)) == expected
    assert "per example" in tuned.prepared.counts.note
    many = changed_entries(Tuned("meprop-rows"), batch())
    assert all(many[name] >= expected[name] for name in expected)


@pytest.mark.parametrize("name", WHOLE)
@linear_and_conv1d
def test_counts_of_whole_parameters_are_what_requires_a_gradient(
    name: str, architecture: str
) -> None:
    tuned = Tuned(name, architecture)
    trainable = {n: p.numel() for n, p in tuned.model.named_parameters() if p.requires_grad}
    in_targets = sum(size for n, size in trainable.items() if n not in HEAD[architecture])
    counts = tuned.prepared.counts
    assert counts.trainable_targets == in_targets
    by_hand = {
        "full": TARGET_ENTRIES,
        "lora": 2 * 6 * (HIDDEN + INNER),
        "core-dense": 2 * BLOCKS * 6 * 6,
    }
    assert in_targets == by_hand.get(name, in_targets)
    assert counts.trainable_head == sum(trainable[n] for n in HEAD[architecture])


@every_method
@both_scopes
def test_counts_block_adds_up(name: str, scope: str) -> None:
    counts = Tuned(name, scope=scope).prepared.counts
    base = classifier()
    total = sum(p.numel() for p in base.parameters())
    block = counts.record().to_json()
    assert block["model_parameters"] == total
    assert block["target_parameters"] == TARGET_ENTRIES
    assert block["trainable_head"] == 2 * HIDDEN + 2
    rest = total - TARGET_ENTRIES - block["trainable_head"] if scope == "rest" else 0
    assert block["trainable_rest"] == rest
    assert block["trainable"] == block["trainable_targets"] + 2 * HIDDEN + 2 + rest
    assert block["density"] == pytest.approx(block["trainable_targets"] / TARGET_ENTRIES)
    assert sum(row["entries"] for row in block["targets"]) == block["trainable_targets"]


@every_method
def test_interrupted_training_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    """Ten steps with dropout and a falling learning rate, whole and cut after five."""

    def fresh() -> tuple[Tuned, torch.optim.lr_scheduler.LRScheduler]:
        tuned = Tuned(name, scope="rest")
        schedule = torch.optim.lr_scheduler.LambdaLR(tuned.optimizer, lambda n: 1 - n / 20)
        tuned.model.train()
        return tuned, schedule

    def run(tuned: Tuned, schedule: torch.optim.lr_scheduler.LRScheduler, numbers: range) -> None:
        for number in numbers:
            tuned.step(batch(seed=1000 + number))
            schedule.step()

    with temporary_seed(4):
        whole, schedule = fresh()
        run(whole, schedule, range(10))
    with temporary_seed(4):
        first, schedule = fresh()
        run(first, schedule, range(5))
        state = trainable_state(first.model)
        save(tmp_path, state, first.optimizer, schedule)
    with temporary_seed(99):
        second, schedule = fresh()
        load_by_name(second.model, read_tensors(tmp_path / "trainable.safetensors"))
        load_optimizer(tmp_path, second.optimizer, schedule)
        load_random(tmp_path)
        run(second, schedule, range(5, 10))
    expected, got = snapshot(whole.model), snapshot(second.model)
    assert all(torch.equal(expected[n], got[n]) for n in expected)
    adapters = [t.method.adapter_tensors(t.model) for t in (whole, second)]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(adapters[0][k], adapters[1][k]) for k in adapters[0])


@every_method
def test_training_under_autocast(name: str) -> None:
    tuned = Tuned(name)
    before, inputs = snapshot(tuned.model), batch()
    losses = []
    for _ in range(20):
        tuned.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = tuned.model(**inputs).loss
        loss.backward()
        tuned.optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    for parameter_name, parameter in tuned.model.named_parameters():
        assert parameter.dtype == before[parameter_name].dtype == torch.float32
        assert parameter.grad is None or parameter.grad.dtype == torch.float32
        assert torch.isfinite(parameter).all()


@every_method
def test_what_trains_is_float32_in_a_half_precision_model(name: str) -> None:
    tuned = Tuned(name, scope="rest", dtype=torch.bfloat16)
    before, inputs = snapshot(tuned.model), batch()
    for _ in range(3):
        tuned.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = tuned.model(**inputs).loss
        loss.backward()
        tuned.optimizer.step()
    for parameter_name, parameter in tuned.model.named_parameters():
        wanted = torch.float32 if parameter.requires_grad else torch.bfloat16
        assert parameter.dtype == wanted, parameter_name
        if not parameter.requires_grad:
            assert torch.equal(parameter, before[parameter_name])


@pytest.mark.parametrize("name", ["lora", "core-static"])
def test_a_float32_head_behind_a_half_precision_body_needs_no_autocast(name: str) -> None:
    tuned = Tuned(name, dtype=torch.bfloat16, train=TrainSection(learning_rate=1e-5))
    head = tuned.model.get_parameter("classifier.weight")
    before = head.detach().clone()
    losses = tuned.steps(3)
    assert head.dtype == torch.float32 and all(map(math.isfinite, losses))
    moved = (head.detach() - before).abs()
    assert 0 < float(moved.max()) < 1e-4  # lost in bfloat16


@every_method
def test_gradient_checkpointing_changes_nothing(name: str) -> None:
    plain, checkpointed = Tuned(name), Tuned(name)
    enable = getattr(checkpointed.model, "activation_checkpointing_enable", None)
    (enable or checkpointed.model.gradient_checkpointing_enable)()  # type: ignore[operator]
    assert any(getattr(m, "gradient_checkpointing", False) for m in checkpointed.model.modules())
    assert plain.steps(3) == checkpointed.steps(3)
    expected, got = snapshot(plain.model), snapshot(checkpointed.model)
    assert all(torch.equal(expected[n], got[n]) for n in expected)
