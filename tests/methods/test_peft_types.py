"""Every PEFT type as a method, on a tiny BERT and a tiny LLaMA, held to one contract."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftType
from pydantic import ValidationError
from support.checkpoint_files import save
from support.tiny_models import batch, batches, classifier, logits, snapshot, targets_of
from torch import Tensor

from sparsegrad_cli.errors import RecipeError, UsageError
from sparsegrad_cli.io.atomic import read_tensors, save_tensors
from sparsegrad_cli.methods.base import TargetShapes
from sparsegrad_cli.methods.implementation import (
    TrainingData,
    check_what_trains,
    load_by_name,
    trainable_state,
)
from sparsegrad_cli.methods.peft_types.settings import PeftSettings
from sparsegrad_cli.methods.peft_types.tuner_facts import RUNNING, TUNERS, VARIANTS
from sparsegrad_cli.methods.registry import spelled_out
from sparsegrad_cli.models.targets import Target
from sparsegrad_cli.numerics.seeding import temporary_seed
from sparsegrad_cli.recipe.load_recipe import load_recipe
from sparsegrad_cli.recipe.schema import TrainSection
from sparsegrad_cli.training.checkpoint import load_optimizer, load_random

# Sizes for layers of 16 and 40 features; other types run with PEFT's own.
SMALL: dict[str, dict[str, Any]] = {
    "adamss": {"r": 8, "num_subspaces": 2},
    "fourierft": {"n_frequency": 20},
    "gralora": {"r": 4},
    "hira": {"r": 4},
    "lily": {"r": 4},
    "miss": {"r": 4},
    "oft": {"oft_block_size": 4},
    "peanut": {"r": 4},
    "psoft": {"r": 4},
    "pvera": {"r": 8},
    "randlora": {"r": 4},
    "shira": {"r": 2},
    "supertuning": {"sparsity": 0.9},
    "tinylora": {"u": 4},
    "unilora": {"theta_d_length": 20},
    "vblora": {"num_vectors": 8, "r": 2},
    "vera": {"r": 8},
    "waveft": {"n_frequency": 20},
}
NAMES = [name.lower() for name in RUNNING if name != "LORA"]
NAMES += [name for name in VARIANTS if name != "rslora"]
# A spectrum or a vector of few parameters needs larger steps.
RATES = {"randlora": 1e-3, **dict.fromkeys(("pissa", "olora", "corda", "lora_ga"), 5e-3)}
COUNTED_WITH_BIASES = ("glora", "ln_tuning")  # shapes do not say whether a layer has one
ROUNDED = 2e-6  # of logits about 0.1: a product made in two ways

every_type = pytest.mark.parametrize("name", NAMES)
# Each test runs on one model; `make test-slow` runs it on the other one too.
bert_first = pytest.mark.parametrize(
    "architecture", ["bert", pytest.param("llama", marks=pytest.mark.slow)]
)
llama_first = pytest.mark.parametrize(
    "architecture", ["llama", pytest.param("bert", marks=pytest.mark.slow)]
)


def settings_of(name: str, **more: Any) -> PeftSettings:
    """The settings of a type or variant at a small size."""
    keys = {**spelled_out(name), **SMALL.get(name, {}), **more}
    if keys.get("type") == "LORA":
        keys.setdefault("r", 2)
    return PeftSettings.model_validate(keys)


def tiny(architecture: str, **overrides: Any) -> Any:
    """A classifier of one block."""
    return classifier(architecture, 0, num_hidden_layers=1, **overrides)


class Tuned:
    """A tiny classifier with PEFT's layers, and its optimizer."""

    def __init__(
        self,
        name: str,
        architecture: str = "bert",
        *,
        scope: str = "head",
        data: bool = True,
        seed: int = 0,
        **overrides: Any,
    ) -> None:
        self.model: Any = tiny(architecture, **overrides)
        self.targets = targets_of(self.model)
        self.method: Any = settings_of(name).implementation()
        training = TrainingData(20, self._batches, self._loss) if data else None
        with temporary_seed(seed):
            self.prepared = self.method.prepare(
                self.model, self.targets, scope=scope, training=training
            )
        train = TrainSection(learning_rate=RATES.get(name, 2e-2))
        self.optimizer = self.method.optimizer(self.model, train)

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        return itertools.islice(batches(4), 3)

    def _loss(self, inputs: Any) -> Tensor:
        loss: Tensor = self.model(**inputs).loss
        return loss

    def step(self, inputs: dict[str, Tensor]) -> float:
        """One optimizer step; returns the loss before it."""
        self.optimizer.zero_grad()
        loss = self._loss(inputs)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def steps(self, numbers: range) -> list[float]:
        """Steps on batches that differ, in training mode."""
        self.model.train()
        return [self.step(batch(seed=1000 + number)) for number in numbers]


def test_every_type_of_peft_is_known() -> None:
    assert TUNERS.keys() == {kind.value for kind in PeftType} - {"SPARSEGRAD"}


@pytest.mark.parametrize("name", [name for name, tuner in TUNERS.items() if tuner.refusal])
def test_types_that_do_not_train_target_modules_are_refused(name: str) -> None:
    with pytest.raises(ValidationError, match=TUNERS[name].refusal[:40]):
        PeftSettings.model_validate(spelled_out(name.lower()))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (("method.rr=4",), "is not a key of PEFT's VERA"),
        (("method.target_modules=x",), "targets.modules"),
        (("method.save_projection=true",), "has no effect"),
        (("method.r=big",), "valid integer"),
        (("method.r=-4",), "expected at least 1, got -4"),
        (("method.vera_dropout=3",), "expected a share from 0 to below 1, got 3"),
        (("method.density=0.01",), "only with match: trainable"),
        (("method.density=0.01", "match=none"), "only with match: trainable"),
    ],
)
def test_keys_that_do_not_fit_are_refused(keys: tuple[str, ...], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(None, ("method=vera", *keys))
    problem = caught.value.problems[0]
    assert said in f"{problem.what} {problem.fix}"


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("{name: dora, use_dora: false}", "which stands for use_dora: true"),
        ("{name: dora, type: vera}", "which stands for type: LORA"),
        ("{name: pissa, init_lora_weights: olora}", "which stands for init_lora_weights: pissa"),
    ],
)
def test_a_key_that_contradicts_the_name_is_refused(method: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(None, (f"method={method}",))
    assert said in caught.value.problems[0].what
    assert load_recipe(None, ("method={name: dora, use_dora: true}",)).recipe.method.name == "peft"


def test_another_name_replaces_the_keys_of_a_variant() -> None:
    layers = ("method=dora", "method.r=4"), ("method=dora", "method=pissa")
    dora, pissa = (load_recipe(None, given).recipe.method.model_dump() for given in layers)
    assert dora["use_dora"] and dora["r"] == 4
    assert pissa["init_lora_weights"] == "pissa" and "use_dora" not in pissa


@pytest.mark.parametrize("name", ["shira", "unilora", "miss", "randlora", "c3a"])
def test_density_is_solved_for_the_nearest_size(name: str) -> None:
    """No other size is nearer to the number that was asked for."""
    targets = [
        Target(f"layer.{at}", "dense", at, *shape, False)
        for at, shape in enumerate(((32, 16), (16, 32)))
    ]
    asked = PeftSettings.model_validate({**spelled_out(name), "density": 0.3})
    requested = 2 * round(0.3 * 32 * 16)
    found = asked.sizing(TargetShapes(targets)).trainable
    sizes = asked.size_range(TargetShapes(targets))
    assert sizes is not None
    every = range(sizes.least, min(sizes.most, sizes.least + 400) + 1)
    counts = {asked.with_size(size).count(targets) for size in every}
    assert abs(found - requested) == min(abs(count - requested) for count in counts)


@pytest.mark.parametrize("name", ["frod", "shira", "monteclora"])
def test_estimates_that_need_values_are_refused(name: str) -> None:
    shapes = TargetShapes([Target("layer", "dense", 0, 16, 8, False)])
    with pytest.raises(UsageError, match="cannot be counted without values"):
        settings_of(name).settle_for_estimate(shapes)


def test_the_page_of_types_is_that_of_the_installed_peft() -> None:
    text = (Path(__file__).parents[2] / "docs/reference/peft-types.md").read_text()
    assert f"peft {peft.__version__}," in text
    rows = re.findall(r"^\| `([a-z0-9_]+)` \| .*\|.*\|.*\|", text, re.M)
    assert rows == NAMES
    assert "**no**" not in text
    for name, tuner in TUNERS.items():
        assert not tuner.refusal or (f"`{name.lower()}`" in text and tuner.refusal in text)


@every_type
@bert_first
def test_contract(name: str, architecture: str, tmp_path: Path) -> None:
    """Start, counts, what moves, loss, reloading and merging of one run."""
    before = logits(tiny(architecture))
    tuned = Tuned(name, architecture)
    start = logits(tuned.model)
    difference = float((start - before).abs().max())
    if changed := tuned.method.settings.starts_changed:
        assert changed in tuned.prepared.counts.note
        assert difference > 0, "the record states a difference that is not there"
    else:
        assert difference < ROUNDED
    check_what_trains(tuned.model, tuned.prepared.counts)
    in_targets = sum(
        p.numel()
        for n, p in tuned.model.named_parameters()
        if p.requires_grad and not n.startswith(("classifier", "score"))
    )
    assert tuned.prepared.counts.trainable_targets == in_targets
    counted = settings_of(name).sizing(TargetShapes(tuned.targets)).trainable
    if architecture == "llama" and name in COUNTED_WITH_BIASES:
        assert counted > in_targets
    else:
        assert counted == in_targets
    frozen = {n: p.clone() for n, p in tuned.model.named_parameters() if not p.requires_grad}
    moved = snapshot(tuned.model)
    inputs = batch(seed=3)
    with temporary_seed(1):
        losses = [tuned.step(inputs) for _ in range(25)]
    assert losses[-1] < 0.96 * losses[0]
    now = dict(tuned.model.named_parameters())
    assert all(torch.equal(now[n], frozen[n]) for n in frozen)
    different = {n for n in moved if not torch.equal(now[n], moved[n])}
    assert any(n.startswith(tuned.targets[0].name) for n in different)
    trained = logits(tuned.model)
    path = tmp_path / "adapter.safetensors"
    save_tensors(path, tuned.method.adapter_tensors(tuned.model), {})
    fresh = Tuned(name, architecture, data=False)
    fresh.method.load_adapter(fresh.model, read_tensors(path))
    assert torch.equal(logits(fresh.model), trained)
    check_merged(name, architecture, tuned, trained)


def check_merged(name: str, architecture: str, tuned: Tuned, trained: Tensor) -> None:
    """The plain model with merged weights computes the same; factors give the same weights."""
    plain = tiny(architecture)
    head = {n: p for n, p in tuned.model.named_parameters() if n in dict(plain.named_parameters())}
    targets = {f"{t.name}.{part}" for t in tuned.targets for part in ("weight", "bias")}
    with torch.no_grad():
        for parameter_name, parameter in head.items():
            if parameter_name not in targets:
                plain.get_parameter(parameter_name).copy_(parameter)
        for target in tuned.targets:
            if TUNERS[tuned.method.settings.type].merge_refusal or (
                name == "beft" and architecture == "llama"
            ):
                with pytest.raises(UsageError, match="cannot be merged"):
                    tuned.method.merged_OI(tuned.model, target)
                return
            merged = tuned.method.merged_OI(tuned.model, target)
            base = plain.get_submodule(target.name)
            factors = tuned.method.factors(tuned.model, target)
            if factors is not None:
                change = merged - base.weight.double()
                torch.testing.assert_close(factors.product_OI(), change, atol=1e-6, rtol=0)
            base.weight.copy_(merged)
            bias = tuned.method.merged_bias(tuned.model, target)
            if bias is not None:
                base.bias.copy_(bias)
    torch.testing.assert_close(logits(plain), trained, atol=2e-5, rtol=1e-4)


@every_type
@llama_first
def test_interrupted_training_goes_on_bit_for_bit(
    name: str, architecture: str, tmp_path: Path
) -> None:
    """Four steps with dropout, whole and cut after two."""

    def fresh() -> tuple[Tuned, Any]:
        tuned = Tuned(name, architecture, scope="rest")
        return tuned, torch.optim.lr_scheduler.LambdaLR(tuned.optimizer, lambda n: 1.0)

    with temporary_seed(4):
        whole, _ = fresh()
        whole.steps(range(4))
    with temporary_seed(4):
        first, schedule = fresh()
        first.steps(range(2))
        save(tmp_path, trainable_state(first.model), first.optimizer, schedule)
    with temporary_seed(99):
        second, schedule = fresh()
        load_by_name(second.model, read_tensors(tmp_path / "trainable.safetensors"))
        load_optimizer(tmp_path, second.optimizer, schedule)
        load_random(tmp_path)
        second.steps(range(2, 4))
    expected, got = snapshot(whole.model), snapshot(second.model)
    assert all(torch.equal(expected[n], got[n]) for n in expected)
    adapters = [t.method.adapter_tensors(t.model) for t in (whole, second)]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(adapters[0][k], adapters[1][k]) for k in adapters[0])
