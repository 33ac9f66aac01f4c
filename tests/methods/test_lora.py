"""LoRA: the rank that density asks for, and adapters that train in float32."""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import batch, classifier, logits, targets_of

from sparsegrad_cli.methods.lora.method import Lora
from sparsegrad_cli.methods.lora.settings import LoraSettings
from sparsegrad_cli.methods.sized_settings import DEFAULT_RANK
from sparsegrad_cli.models.targets import Target
from sparsegrad_cli.numerics.sizing import count_for_density
from sparsegrad_cli.recipe.schema import TrainSection


def layers(*shapes: tuple[int, int]) -> list[Target]:
    return [Target(f"l.{n}", "k", n, out, width, False) for n, (out, width) in enumerate(shapes)]


@pytest.mark.parametrize("density", [0.001, 0.005, 0.01, 0.012, 0.03, 0.1, 0.5])
@pytest.mark.parametrize(
    "shapes",
    [((3072, 768), (768, 3072)), ((1536, 384), (384, 1536)), ((100, 10), (10, 70), (33, 33))],
)
def test_the_solved_rank_is_the_nearest(
    density: float, shapes: tuple[tuple[int, int], ...]
) -> None:
    targets = layers(*shapes)
    settings = LoraSettings(name="lora", density=density)
    rank, requested = settings.size_on(targets), settings.requested(targets)
    assert requested is not None
    assert requested == sum(round(density * out * width) for out, width in shapes)

    def miss(r: int) -> int:
        return abs(sum(r * (out + width) for out, width in shapes) - requested)

    best = min(range(1, 800), key=miss)
    assert miss(rank) == miss(best)


def test_bert_base_at_one_percent_is_rank_six() -> None:
    """23,593 entries a layer of 3,072 x 768; a rank costs 3,840."""
    targets, settings = layers((3072, 768), (768, 3072)), LoraSettings(name="lora", density=0.01)
    assert (settings.size_on(targets), settings.requested(targets)) == (6, 2 * 23593)


def test_the_rank_is_at_least_one() -> None:
    assert LoraSettings(name="lora", density=1e-4).size_on(layers((40, 16))) == 1


def test_density_sets_the_rank_and_the_remainder_is_stated() -> None:
    model = classifier()
    targets = targets_of(model)
    method = Lora(LoraSettings(name="lora", density=0.2))
    block = method.prepare(model, targets, scope="head").counts.record().to_json()
    requested = sum(count_for_density(0.2, t.out_features, t.in_features) for t in targets)
    assert requested == 6 * 128
    assert block["requested_target_entries"] == requested
    assert block["trainable_targets"] == 6 * 2 * 56
    assert block["remainder"] == 6 * (2 * 56 - 128)
    assert block["note"] == "rank 2"


def test_default_rank_and_alpha() -> None:
    model = classifier()
    targets = targets_of(model)
    method = Lora(LoraSettings(name="lora"))
    method.prepare(model, targets, scope="head")
    layer = model.get_submodule(targets[0].name)
    assert layer.r["default"] == DEFAULT_RANK  # type: ignore[index]
    assert layer.scaling["default"] == 2.0  # type: ignore[index]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_of_a_half_precision_model_train_in_float32(dtype: torch.dtype) -> None:
    model = classifier(dtype=dtype)
    before = logits(model)
    targets = targets_of(model)
    method = Lora(LoraSettings(name="lora", rank=2))
    method.prepare(model, targets, scope="head")
    adapters = {n: p for n, p in model.named_parameters() if "lora_" in n}
    assert len(adapters) == 12
    assert {p.dtype for p in adapters.values()} == {torch.float32}
    # The head is float32 now: the same but for what its output was rounded to.
    torch.testing.assert_close(logits(model).to(dtype), before, rtol=1e-2, atol=1e-4)
    optimizer = method.optimizer(model, TrainSection(learning_rate=1e-4))
    kept = {n: p.detach().clone() for n, p in adapters.items()}
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch()).loss.backward()
        optimizer.step()
    assert all(not torch.equal(kept[n], p.detach()) for n, p in adapters.items())
    frozen = classifier(dtype=dtype).get_submodule(targets[0].name).weight
    assert torch.equal(model.get_submodule(f"{targets[0].name}.base_layer").weight, frozen)  # type: ignore[arg-type]


def test_dropout_and_rslora_reach_peft() -> None:
    model = classifier()
    targets = targets_of(model)
    settings = LoraSettings(name="lora", rank=4, alpha=6.0, dropout=0.25, rslora=True)
    Lora(settings).prepare(model, targets, scope="head")
    layer = model.get_submodule(targets[-1].name)
    assert layer.lora_dropout["default"].p == 0.25  # type: ignore[index,union-attr]
    assert layer.scaling["default"] == pytest.approx(6.0 / 2.0)  # type: ignore[index]
