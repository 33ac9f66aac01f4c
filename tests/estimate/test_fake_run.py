"""The memory of a fake step equals the count on real tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import classifier, config, one_thread
from torch import Tensor, nn

from sparsegrad_cli.calibration.calibrate import calibrate
from sparsegrad_cli.data.batches import UNLABELLED, ChatCollator
from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.estimate.fake_model import name_task
from sparsegrad_cli.estimate.fake_run import STEP, Conditions, FakeRun
from sparsegrad_cli.memory.meter import MemoryMeter
from sparsegrad_cli.memory.storage_tracker import PhasePeak
from sparsegrad_cli.methods.base import TargetShapes
from sparsegrad_cli.methods.neighbours.adaptive_settings import ADAPTIVE
from sparsegrad_cli.methods.neighbours.change_settings import CHANGES
from sparsegrad_cli.models.architectures import configuration_of
from sparsegrad_cli.models.lm_loss import use_lm_loss
from sparsegrad_cli.models.load_model import load_classifier
from sparsegrad_cli.models.memory_savers import save_memory
from sparsegrad_cli.models.sampled_loss import SampledLoss
from sparsegrad_cli.models.targets import find_targets
from sparsegrad_cli.recipe.load_recipe import LoadedRecipe, load_recipe
from sparsegrad_cli.recipe.tasks import BUILTIN_TASKS
from sparsegrad_cli.tasks.setup import without_padding

SIZE, LENGTH = 2, 32
LENGTHS = (LENGTH, LENGTH // 2)  # Tokens of the rows, where some are padded.
# SmolLM2-135M's shapes with fewer layers.
SMOLLM2 = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 49152,
    "hidden_size": 576,
    "num_hidden_layers": 1,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "tie_word_embeddings": True,
}
TINY: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": 1000,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": LENGTH,
}
CORE = ("method.rank=96",)
METHODS = {
    "full": ("method=full",),
    "lora": ("method.name=lora", "method.density=0.01", "match=trainable"),
    "meprop": ("method.name=meprop",),
    "materialized": ("method.form=materialized",),
    "core": CORE,
    "adafactor": ("method=full", "train.optim=adafactor"),
    "adamw_8bit": ("method=lora", "train.optim=adamw_8bit"),
}
CHAT = "task.name=builtin:dialogues"


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with one_thread():
        yield


def config_folder(tmp_path_factory: pytest.TempPathFactory, config: dict[str, Any]) -> Path:
    """Return a model folder with a configuration and no weights."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return config_folder(tmp_path_factory, SMOLLM2)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a small model folder for tests that do not depend on the model."""
    return f"model={config_folder(tmp_path_factory, TINY)}"


def recipe(*overrides: str) -> LoadedRecipe:
    """The quickstart at this file's shapes; bases are unit matrices: their numbers cost nothing."""
    shapes = (f"task.max_length={LENGTH}", f"train.per_device_train_batch_size={SIZE}")
    bases = ("calibration.source=original", "calibration.basis_per=kind")
    return load_recipe(None, (*shapes, *bases, *overrides))


def told(loaded: LoadedRecipe) -> Any:
    """Return the model's configuration with the task's classes."""
    config, _ = configuration_of(loaded.recipe.model)
    name_task(loaded.recipe, config)
    return config


def faked(loaded: LoadedRecipe, **conditions: Any) -> FakeRun:
    return FakeRun(loaded, told(loaded), Conditions(**conditions))


# --- the other side: real tensors


def numbers() -> Tensor:
    """Return (SIZE, LENGTH) token ids."""
    return torch.randint(5, 1000, (SIZE, LENGTH), generator=torch.Generator().manual_seed(0))


def sentences(*, types: bool = True) -> dict[str, Tensor]:
    """Return a real batch whose last row is half padding."""
    ids = numbers()
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch["attention_mask"][-1, LENGTHS[-1] :] = 0
    if types:
        batch["token_type_ids"] = torch.zeros_like(ids)
    return {**batch, "labels": ids[:, 0] % 2}


def conversations(*, short: int = 0, packed: bool = False) -> dict[str, Tensor]:
    """Collate a batch with all tokens labelled, whose last row is ``short`` tokens shorter."""
    rows = [{"input_ids": ids, "labels": ids} for ids in numbers().tolist()]
    rows[-1] = {name: ids[: LENGTH - short] for name, ids in rows[-1].items()}
    if packed:  # two conversations in each row
        rows = [row | {"lengths": [LENGTH // 2] * 2} for row in rows]
    return ChatCollator(0)(rows)


def bert(loaded: LoadedRecipe) -> nn.Module:
    from transformers import AutoModelForSequenceClassification as Classifier

    dtype = getattr(torch, loaded.recipe.model.dtype)
    model: nn.Module = Classifier.from_config(told(loaded), dtype=dtype)
    return model


def minilm(loaded: LoadedRecipe) -> nn.Module:
    return load_classifier(
        loaded.recipe.model, BUILTIN_TASKS["builtin:acceptability"], seed=0
    ).model


def language_model(folder: Path, sampled: SampledLoss | None = None) -> nn.Module:
    """Return the model with the loss that training gives it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    use_lm_loss(model, sampled)
    return model


def counted(loaded: LoadedRecipe, model: nn.Module, batch: dict[str, Tensor]) -> MemoryMeter:
    """Take the second step of a recipe's method on real tensors."""
    recipe = loaded.recipe
    targets = find_targets(model, recipe.targets)
    settings = recipe.method
    save_memory(model, targets, settings.recompute)
    without_padding(model, recipe)
    bases = None
    if settings.calibrates:
        section = recipe.calibration
        settings = settings.settle(TargetShapes(targets, section.basis_per))
        found = calibrate(model, targets, lambda: iter([batch]), section, seed=0)
        bases = found.by_target()
        del found
    method = settings.implementation()
    prepared = method.prepare(model, targets, scope=recipe.scope, bases=bases)
    del bases
    if recipe.train.gradient_checkpointing:
        model.activation_checkpointing_enable()  # type: ignore[operator]
    optimizer = method.optimizer(model, recipe.train)
    model.train()
    draw = {"loss_draw": (1, 1)} if recipe.train.loss != "full" else {}
    model(**batch, **draw).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    meter = MemoryMeter()
    meter.watch(model, bases=prepared.bases, optimizer=optimizer)
    with meter.phase("forward"):
        loss = model(**batch, **draw).loss
    with meter.phase("backward"):
        loss.backward()
    del loss
    with meter.phase("optimizer"):
        optimizer.step()
    return meter


def same(estimated: MemoryMeter, real: MemoryMeter, *, saved: bool = True) -> None:
    """Compare the peak of every phase to the byte, by category."""
    for phase in STEP:
        expected, found = real.peak(phase), estimated.peak(phase)
        assert expected is not None and found is not None
        assert found.categories == expected.categories, phase
        assert found.peak_bytes == expected.peak_bytes > 0
        assert not saved or found.saved_at_end == expected.saved_at_end


def alike(estimated: MemoryMeter, real: MemoryMeter) -> None:
    """The estimate is at most 1 % larger, because it assumes a label for every token."""
    for phase in STEP:
        expected, found = real.peak(phase), estimated.peak(phase)
        assert expected is not None and found is not None
        for category in ("weights", "bases", "gradients", "optimizer_state"):
            assert found.categories[category] == expected.categories[category]
        assert expected.peak_bytes <= found.peak_bytes <= 1.01 * expected.peak_bytes


# --- to the byte


@pytest.mark.parametrize("name", METHODS)
def test_a_step_of_minilm_is_estimated_to_the_byte(name: str) -> None:
    loaded = recipe(*METHODS[name])
    same(faked(loaded).step(SIZE, LENGTH, LENGTHS), counted(loaded, minilm(loaded), sentences()))


@pytest.mark.parametrize("name", ["full", "core"])
def test_a_step_of_a_language_model_is_estimated(smollm2: Path, name: str) -> None:
    """test_runs.py has the other methods."""
    loaded = recipe(f"model={smollm2}", CHAT, *METHODS[name])
    real = counted(loaded, language_model(smollm2), conversations(short=1))
    alike(faked(loaded).step(SIZE, LENGTH, LENGTHS), real)


@pytest.mark.parametrize("loss", ["sce", "rece"])
@pytest.mark.parametrize("name", ["full", "core"])
def test_a_step_with_a_sampled_loss_is_estimated(smollm2: Path, name: str, loss: str) -> None:
    """Sets of fake tensors have the sizes of real ones, which follow from the recipe alone."""
    loaded = recipe(f"model={smollm2}", CHAT, *METHODS[name], f"train.loss={loss}")
    sampled = SampledLoss.of(loaded.recipe)
    real = counted(loaded, language_model(smollm2, sampled), conversations(short=1))
    alike(faked(loaded).step(SIZE, LENGTH, LENGTHS), real)


@pytest.mark.parametrize("packing", ["pack", "concatenate"])
def test_packed_rows_have_their_mask(smollm2: Path, packing: str) -> None:
    """Packed conversations need a mask between them; one long text needs none."""
    loaded = recipe(f"model={smollm2}", CHAT, f"task.chat.packing={packing}", "method=lora")
    batch = conversations(packed=packing == "pack")
    real = counted(loaded, language_model(smollm2), batch)
    estimated = faked(loaded).step(SIZE, LENGTH, LENGTHS)
    alike(estimated, real)
    expected, found = real.peak("forward"), estimated.peak("forward")
    assert expected is not None and found is not None
    unlabelled = SIZE * LENGTH - int((batch["labels"][:, 1:] != UNLABELLED).sum())
    # Of a labelled token the loss keeps a gradient and a position.
    more = unlabelled * (4 * int(str(SMOLLM2["hidden_size"])) + 8)
    assert found.saved_at_end - expected.saved_at_end == more


@pytest.mark.parametrize(
    "overrides",
    [
        ("method.form=rotated",),
        ("method.rank=12", "method.support=dynamic"),
        ("method.rank=12", "method.support=dense"),
        ("method=full", "train.gradient_checkpointing=true"),
        (*CORE, "method.recompute=activation", "model.dtype=bfloat16"),
        ("method=lora", "model.dtype=bfloat16"),
        ("method=lora", "scope=rest"),
        # An estimate counts a step that chooses the subspace or the columns again.
        ("method.name=galore", "method.update_every=1"),
        ("method.name=fira", "method.update_every=1"),
        ("method.name=dct_adamw", "method.update_every=1"),
        ("method.name=frugal", "method.update_every=1", "scope=rest"),
        ("method.name=gradnormlorp", "method.update_every=1"),
        ("method.name=lora_pro", "model.dtype=bfloat16"),
        ("method.name=allora",),
    ],
)
def test_recipe_settings_are_estimated_to_the_byte(tiny: str, overrides: tuple[str, ...]) -> None:
    loaded = recipe(tiny, *overrides)
    same(faked(loaded).step(SIZE, LENGTH, LENGTHS), counted(loaded, bert(loaded), sentences()))


# DiffoRA's second step, which is measured here, trains the gates; the first is estimated.
@pytest.mark.parametrize("name", [name for name in CHANGES | ADAPTIVE if name != "diffora"])
def test_neighbours_are_estimated_to_the_byte(tiny: str, name: str) -> None:
    loaded = recipe(tiny, f"method={name}")
    same(faked(loaded).step(SIZE, LENGTH, LENGTHS), counted(loaded, bert(loaded), sentences()))


@pytest.mark.parametrize("method", [("pela",), ("welore", "method.allocation=uniform")])
def test_factors_in_place_of_weights_are_estimated_to_the_byte(
    tiny: str, method: tuple[str, ...]
) -> None:
    name, *more = method
    loaded = recipe(tiny, f"method.name={name}", *more)
    same(faked(loaded).step(SIZE, LENGTH, LENGTHS), counted(loaded, bert(loaded), sentences()))


@pytest.mark.parametrize("name", ["deberta-v3", "gpt2", "opt"])
def test_other_architectures_are_estimated_to_the_byte(name: str) -> None:
    loaded = recipe("method.rank=8")
    settings = config(name, max_position_embeddings=LENGTH)
    name_task(loaded.recipe, settings)
    batch = sentences(types=getattr(settings, "type_vocab_size", 0) > 1)
    batch["input_ids"] = batch["input_ids"] % 60
    real = counted(loaded, classifier(name, max_position_embeddings=LENGTH), batch)
    # DeBERTa saves roots of its sides, eight bytes each, which fake tensors hold as numbers.
    estimated = FakeRun(loaded, settings, Conditions()).step(SIZE, LENGTH, LENGTHS)
    same(estimated, real, saved=name != "deberta-v3")


def test_without_padding_attention_has_no_mask(tiny: str) -> None:
    """transformers makes no mask for a batch without padding."""
    loaded = recipe(tiny, "method=lora", "train.unpadded=false")
    batch = sentences()
    batch["attention_mask"].fill_(1)
    same(faked(loaded, padded=False).step(SIZE, LENGTH), counted(loaded, bert(loaded), batch))
    # With a mask, and computed all the same.
    batch = sentences()
    same(faked(loaded).step(SIZE, LENGTH), counted(loaded, bert(loaded), batch))


# --- steps


def test_fake_run_takes_batches_of_any_size_and_keeps_no_memory(tiny: str) -> None:
    fake = faked(recipe(tiny, *CORE))
    first = fake.step(SIZE, LENGTH, LENGTHS).report().to_json()
    larger = fake.step(2 * SIZE, LENGTH).report().to_json()
    fake.evaluation(64, LENGTH)
    again = fake.step(SIZE, LENGTH, LENGTHS).report().to_json()
    assert larger["peak_bytes"] > 1.3 * first["peak_bytes"]
    for report in (first, again):
        for phase in report["phases"].values():
            del phase["rss_bytes"]  # of this very process; it has nothing to do with the step
    assert first == again


def test_accumulated_gradients_count_in_forward_but_not_in_evaluation(tiny: str) -> None:
    plain = faked(recipe(tiny, "method=full"))
    lying = faked(recipe(tiny, "method=full", "train.gradient_accumulation_steps=2"))
    without = plain.step(SIZE, LENGTH, LENGTHS).peak("forward")
    gradients = sum(4 * p.numel() for p in lying.model.parameters() if p.requires_grad)
    for _ in range(2):  # evaluation clears them, the next step finds them again
        found = lying.step(SIZE, LENGTH, LENGTHS).peak("forward")
        assert without is not None and found is not None
        assert found.categories["gradients"] == gradients
        assert found.peak_bytes == without.peak_bytes + gradients
        evaluations = [each.evaluation(SIZE, LENGTH).peak("evaluate") for each in (plain, lying)]
        assert evaluations[0] is not None and evaluations[1] is not None
        assert evaluations[0].categories == evaluations[1].categories


@pytest.mark.parametrize("kernels", ["cpu", "cuda"])
def test_recomputed_blocks_keep_only_their_inputs(tiny: str, kernels: str) -> None:
    def step(recompute: str) -> PhasePeak:
        loaded = recipe(
            tiny, "method=full", "scope=rest", f"train.gradient_checkpointing={recompute}"
        )
        peak = faked(loaded, kernels=kernels).step(SIZE, LENGTH, LENGTHS).peak("forward")
        assert peak is not None
        return peak

    plain, lean = step("false").saved_at_end, step("true").saved_at_end
    hidden = 4 * SIZE * LENGTH * TINY["hidden_size"]
    # Of a block its input; of what is not in a block (embeddings, pooler, loss) a few of that size.
    assert 2 * hidden < lean < 8 * hidden < plain


def test_bounded_optimizer_state_is_estimated_at_its_largest() -> None:
    """State: 20 bytes a row (position, two means, age, last step), a clock, one bit a parameter."""
    loaded = recipe(*CORE, "method.support=dynamic", "method.state_capacity=3")
    fake = faked(loaded)
    peak = fake.step(SIZE, LENGTH, LENGTHS).peak("forward")
    assert peak is not None
    entries = [count.entries for count in fake.prepared.counts.targets]
    state = sum(20 * min(3 * k, 96 * 96) + 4 + 96 * 96 for k in entries)
    head = [p for n, p in fake.model.named_parameters() if n.startswith("classifier")]
    state += sum(2 * 4 * p.numel() + 4 for p in head)
    assert peak.categories["optimizer_state"] == state


@pytest.mark.parametrize("method", ["method.select=rows", "method.support=refresh"])
def test_memory_that_depends_on_values_is_estimated_at_its_largest(method: str) -> None:
    name = ("method.name=meprop",) if "rows" in method else CORE
    loaded = recipe(*name, method)
    real = counted(loaded, minilm(loaded), sentences())
    estimated = faked(loaded).step(SIZE, LENGTH, LENGTHS)
    for phase in ("forward", "backward"):
        expected, found = real.peak(phase), estimated.peak(phase)
        assert expected is not None and found is not None
        assert expected.peak_bytes <= found.peak_bytes <= 1.05 * expected.peak_bytes


def test_language_model_has_larger_blocks_of_logits_on_a_gpu(smollm2: Path) -> None:
    """Blocks have 16 MiB on a CPU and 64 MiB on a GPU; autograd saves neither."""
    loaded = recipe(f"model={smollm2}", CHAT, "method=lora")

    def step(kernels: str) -> PhasePeak:
        peak = faked(loaded, kernels=kernels).step(8, 64).peak("forward")
        assert peak is not None
        return peak

    here, there = step("cpu"), step("cuda")
    row = 4 * int(str(SMOLLM2["vocab_size"]))
    more = (64 * 2**20 // row - 16 * 2**20 // row) * row
    assert there.categories["other"] - here.categories["other"] >= more
    assert here.saved_at_end + there.saved_at_end < 4 * 512 * row


# --- what no shape can say


def test_rank_as_a_share_of_energy_is_refused() -> None:
    with pytest.raises(UsageError, match="share of energy"):
        faked(recipe("calibration.decomposition=exact", "method.rank=0.9"))


def test_support_over_the_whole_model_is_split_evenly(tiny: str) -> None:
    loaded = recipe(tiny, *CORE, "method.allocation=model", "calibration.score=square")
    fake = faked(loaded)
    assert any("evenly" in note for note in fake.notes)
    even = faked(recipe(tiny, *CORE)).prepared.counts.trainable_targets
    assert fake.prepared.counts.trainable_targets == even


@pytest.mark.parametrize("architecture", ["bert", "distilbert", "t5"])
def test_chat_task_needs_a_language_model(
    tmp_path_factory: pytest.TempPathFactory, architecture: str
) -> None:
    folder = config_folder(tmp_path_factory, config(architecture).to_dict())
    with pytest.raises(UsageError, match="language model"):
        faked(recipe(f"model={folder}", CHAT, "method=lora"))
