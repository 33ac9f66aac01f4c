"""An estimate against the count: the same figures, on tensors that are there."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import classifier, config, one_thread
from torch import Tensor, nn

from sparsegrad_cli.data.spec import BUILTIN_TASKS
from sparsegrad_cli.errors import DownloadError, UsageError
from sparsegrad_cli.measure.environment import rss_bytes
from sparsegrad_cli.measure.estimate import Room, estimate
from sparsegrad_cli.measure.ledger import PhasePeak
from sparsegrad_cli.measure.memory import MemoryMeter
from sparsegrad_cli.measure.rehearsal import STEP, Conditions, Rehearsal
from sparsegrad_cli.methods.core_plan import with_rank
from sparsegrad_cli.methods.table import make_method
from sparsegrad_cli.modeling.architectures import configuration_of
from sparsegrad_cli.modeling.loading import load_classifier, name_labels
from sparsegrad_cli.modeling.targets import find_targets
from sparsegrad_cli.recipe.loading import LoadedRecipe, load_recipe
from sparsegrad_cli.recipe.method_section import SparsegradMethod
from sparsegrad_cli.training.calibration import basis_keys, calibrate

SIZE, LENGTH = 2, 32
SMOLLM2 = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 49152,
    "hidden_size": 576,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "tie_word_embeddings": True,
}
TINY = {
    "model_type": "bert",
    "vocab_size": 1000,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": LENGTH,
}
CORE = ("method.form=core", "method.rank=96")
METHODS = {
    "full": ("method=full",),
    "lora": ("method.name=lora", "method.density=0.01", "match=trainable"),
    "meprop": ("method.name=meprop",),
    "sparsegrad": (),
    "core": CORE,
    "core dynamic": (*CORE, "method.support=dynamic"),
}


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    """One thread; and the meter need not look for garbage among all that pytest has loaded."""
    gc.collect()
    gc.freeze()
    with one_thread():
        yield
    gc.unfreeze()


def config_folder(tmp_path_factory: pytest.TempPathFactory, config: dict[str, Any]) -> Path:
    """A model folder with a configuration and not one weight."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M's configuration with fewer layers."""
    return config_folder(tmp_path_factory, SMOLLM2)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """For what does not depend on the model."""
    return f"model={config_folder(tmp_path_factory, TINY)}"


def recipe(*overrides: str) -> LoadedRecipe:
    """The quickstart at this file's shapes; bases are unit matrices: their numbers cost nothing."""
    shapes = (f"task.max_length={LENGTH}", f"train.per_device_train_batch_size={SIZE}")
    bases = ("calibration.source=original", "calibration.basis_per=kind")
    return load_recipe(None, (*shapes, *bases, *overrides))


def rehearsed(loaded: LoadedRecipe, **conditions: Any) -> Rehearsal:
    config, _ = configuration_of(loaded.recipe.model)
    if conditions.get("kind") != "language model":
        name_labels(config, BUILTIN_TASKS["builtin:acceptability"])
    return Rehearsal(loaded, config, Conditions(**conditions))


def real_batch(*, causal: bool, types: bool) -> dict[str, Tensor]:
    """Real numbers, the last row half padding."""
    ids = torch.randint(5, 1000, (SIZE, LENGTH), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch["attention_mask"][-1, LENGTH // 2 :] = 0
    if types:
        batch["token_type_ids"] = torch.zeros_like(ids)
    batch["labels"] = ids.clone() if causal else ids[:, 0] % 2
    return batch


def counted(loaded: LoadedRecipe, model: nn.Module, batch: dict[str, Tensor]) -> MemoryMeter:
    """The second step of a recipe's method on real tensors."""
    recipe = loaded.recipe
    targets = find_targets(model, recipe.targets)
    settings = recipe.method
    bases = None
    if isinstance(settings, SparsegradMethod):
        section = recipe.calibration
        settings = with_rank(settings, targets, basis_keys(targets, section.basis_per), "")
        found = calibrate(model, targets, lambda: iter([batch]), section, seed=0)
        bases = found.by_target()
        del found
    method = make_method(settings)
    prepared = method.prepare(model, targets, scope=recipe.scope, bases=bases)
    del bases
    if recipe.train.gradient_checkpointing:
        model.activation_checkpointing_enable()  # type: ignore[operator]
    optimizer = method.optimizer(model, recipe.train)
    model.train()
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    meter = MemoryMeter()
    meter.watch(model, bases=prepared.bases, optimizer=optimizer)
    with meter.phase("forward"):
        loss = model(**batch).loss
    with meter.phase("backward"):
        loss.backward()
    with meter.phase("optimizer"):
        optimizer.step()
    return meter


def same(estimated: MemoryMeter, real: MemoryMeter, *, saved: bool = True) -> None:
    """Every phase's peak, to the byte and by category; and all that backward needs."""
    for phase in STEP:
        expected, found = real.peak(phase), estimated.peak(phase)
        assert expected is not None and found is not None
        assert found.categories == expected.categories, phase
        assert found.peak_bytes == expected.peak_bytes > 0
        assert not saved or found.saved_at_end == expected.saved_at_end


# --- to the byte


@pytest.mark.parametrize("name", METHODS)
def test_a_step_of_minilm_is_estimated_to_the_byte(name: str) -> None:
    loaded = recipe(*METHODS[name])
    model = load_classifier(loaded.recipe.model, BUILTIN_TASKS["builtin:acceptability"], seed=0)
    real = counted(loaded, model, real_batch(causal=False, types=True))
    same(rehearsed(loaded).step(SIZE, LENGTH), real)


@pytest.mark.parametrize("name", METHODS)
def test_a_step_of_a_causal_model_is_estimated_to_the_byte(smollm2: Path, name: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    loaded = recipe(f"model={smollm2}", *METHODS[name])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(smollm2))
    real = counted(loaded, model, real_batch(causal=True, types=False))
    same(rehearsed(loaded, kind="language model").step(SIZE, LENGTH), real)


@pytest.mark.parametrize(
    "overrides",
    [
        ("method.form=rotated",),
        ("method=full", "train.gradient_checkpointing=true"),
        (*CORE, "method.recompute=activation", "model.dtype=bfloat16"),
        ("method=lora", "model.dtype=bfloat16"),
        ("method=lora", "scope=rest"),
    ],
)
def test_what_a_recipe_changes_is_estimated_to_the_byte(
    tiny: str, overrides: tuple[str, ...]
) -> None:
    from transformers import AutoModelForSequenceClassification as Classifier

    loaded = recipe(tiny, *overrides)
    config, _ = configuration_of(loaded.recipe.model)
    name_labels(config, BUILTIN_TASKS["builtin:acceptability"])
    model = Classifier.from_config(config, dtype=getattr(torch, loaded.recipe.model.dtype))
    real = counted(loaded, model, real_batch(causal=False, types=True))
    same(rehearsed(loaded).step(SIZE, LENGTH), real)


@pytest.mark.parametrize("name", ["deberta-v3", "gpt2", "opt"])
def test_other_architectures_are_estimated_to_the_byte(name: str) -> None:
    loaded = recipe("method.form=core", "method.rank=8")
    settings = config(name, max_position_embeddings=LENGTH)
    name_labels(settings, BUILTIN_TASKS["builtin:acceptability"])
    batch = real_batch(causal=False, types=getattr(settings, "type_vocab_size", 0) > 1)
    batch["input_ids"] = batch["input_ids"] % 60
    real = counted(loaded, classifier(name, max_position_embeddings=LENGTH), batch)
    # DeBERTa saves roots of its sides, eight bytes each, which fake tensors hold as numbers.
    estimated = Rehearsal(loaded, settings, Conditions()).step(SIZE, LENGTH)
    same(estimated, real, saved=name != "deberta-v3")


def test_without_padding_attention_has_no_mask(smollm2: Path) -> None:
    """A full batch: transformers then makes no mask; only the input itself is left out."""
    from transformers import AutoConfig, AutoModelForCausalLM

    loaded = recipe(f"model={smollm2}", "method=lora")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(smollm2))
    batch = real_batch(causal=True, types=False)
    batch["attention_mask"].fill_(1)
    real = counted(loaded, model, batch).peak("backward")
    conditions = {"kind": "language model", "padded": False}
    found = rehearsed(loaded, **conditions).step(SIZE, LENGTH).peak("backward")
    assert real is not None and found is not None
    assert found.peak_bytes == real.peak_bytes - batch["attention_mask"].nbytes
    assert found.saved_at_end == real.saved_at_end


def test_a_rehearsal_serves_batches_of_any_size_and_leaves_nothing_behind(
    tiny: str,
) -> None:
    rehearsal = rehearsed(recipe(tiny, *CORE))
    first = rehearsal.step(SIZE, LENGTH).report()
    larger = rehearsal.step(2 * SIZE, LENGTH).report()
    rehearsal.evaluation(64, LENGTH)
    again = rehearsal.step(SIZE, LENGTH).report()
    assert larger["peak_bytes"] > 1.3 * first["peak_bytes"]
    for report in (first, again):
        for phase in report["phases"].values():
            del phase["rss_bytes"]  # of this very process; it has nothing to do with the step
    assert first == again


def test_gradients_that_accumulate_are_there_in_forward(tiny: str) -> None:
    plain = rehearsed(recipe(tiny, "method=full")).step(SIZE, LENGTH).peak("forward")
    lying = rehearsed(recipe(tiny, "method=full", "train.gradient_accumulation_steps=2"))
    found = lying.step(SIZE, LENGTH).peak("forward")
    assert plain is not None and found is not None
    trainable = [p for p in lying.model.parameters() if p.requires_grad]
    assert found.categories["gradients"] == sum(4 * p.numel() for p in trainable)
    assert found.peak_bytes == plain.peak_bytes + found.categories["gradients"]


@pytest.mark.parametrize("kernels", ["cpu", "cuda"])
def test_recomputing_blocks_keeps_their_inputs_alone(tiny: str, kernels: str) -> None:
    def step(recompute: str) -> PhasePeak:
        loaded = recipe(
            tiny, "method=full", "scope=rest", f"train.gradient_checkpointing={recompute}"
        )
        peak = rehearsed(loaded, kernels=kernels).step(SIZE, LENGTH).peak("forward")
        assert peak is not None
        return peak

    plain, lean = step("false").saved_at_end, step("true").saved_at_end
    hidden = 4 * SIZE * LENGTH * TINY["hidden_size"]
    # Of a block its input; of what is not in a block (embeddings, pooler, loss) a few of that size.
    assert 2 * hidden < lean < 8 * hidden < plain


def test_bounded_state_is_estimated_full() -> None:
    """Rows of 20 bytes (position, two means, age, last step), a clock, a bit an entry."""
    loaded = recipe(*CORE, "method.support=dynamic", "method.state_capacity=3")
    rehearsal = rehearsed(loaded)
    peak = rehearsal.step(SIZE, LENGTH).peak("forward")
    assert peak is not None
    entries = [count.entries for count in rehearsal.prepared.counts.targets]
    state = sum(20 * min(3 * k, 96 * 96) + 4 + 96 * 96 for k in entries)
    head = [p for n, p in rehearsal.model.named_parameters() if n.startswith("classifier")]
    state += sum(2 * 4 * p.numel() + 4 for p in head)
    assert peak.categories["optimizer_state"] == state


@pytest.mark.parametrize("method", ["method.select=rows", "method.support=refresh"])
def test_what_depends_on_values_is_taken_at_its_most(method: str) -> None:
    name = ("method.name=meprop",) if "rows" in method else CORE
    loaded = recipe(*name, method)
    model = load_classifier(loaded.recipe.model, BUILTIN_TASKS["builtin:acceptability"], seed=0)
    real = counted(loaded, model, real_batch(causal=False, types=True))
    estimated = rehearsed(loaded).step(SIZE, LENGTH)
    for phase in ("forward", "backward"):
        expected, found = real.peak(phase), estimated.peak(phase)
        assert expected is not None and found is not None
        assert expected.peak_bytes <= found.peak_bytes <= 1.05 * expected.peak_bytes


# --- nothing but the configuration


PUBLISHED = {
    "bert-base-uncased": 109_482_240,
    "roberta-base": 124_645_632,
    "roberta-large": 355_359_744,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_known_sizes_give_the_published_number_of_parameters(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModel, AutoModelForCausalLM

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config, source = configuration_of(recipe(f"model={name}").recipe.model)
    assert "built-in table" in source
    loader = AutoModelForCausalLM if config.model_type in ("llama", "mistral") else AutoModel
    with torch.device("meta"):
        model = loader.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


def test_a_model_nobody_knows_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DownloadError, match="nobody/nothing") as error:
        configuration_of(recipe("model=nobody/nothing").recipe.model)
    assert error.value.fix is not None and "Llama-2-7b-hf" in error.value.fix


def test_a_7b_step_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    overrides = ("model=meta-llama/Llama-2-7b-hf", "model.dtype=bfloat16", "task.max_length=512")
    loaded = recipe(*overrides, "targets.modules=['*.up_proj','*.down_proj']", *METHODS["lora"])
    before = rss_bytes()
    rehearsal = rehearsed(loaded, kind="language model")
    peak = rehearsal.step(2, 512).peak("backward")
    assert peak is not None and peak.peak_bytes > 2 * 6_738_415_616
    assert rehearsal.parameters == 6_738_415_616
    assert rss_bytes() - before < 2**30


# --- what no shape can say


def test_a_share_of_energy_is_refused() -> None:
    with pytest.raises(UsageError, match="share of energy"):
        rehearsed(recipe("method.form=core", "method.rank=0.9"))


def test_a_support_over_the_model_is_shared_out_evenly(tiny: str) -> None:
    loaded = recipe(tiny, *CORE, "method.allocation=model", "calibration.score=square")
    rehearsal = rehearsed(loaded)
    assert any("evenly" in note for note in rehearsal.notes)
    even = rehearsed(recipe(tiny, *CORE)).prepared.counts.trainable_targets
    assert rehearsal.prepared.counts.trainable_targets == even


# --- rows


def test_the_largest_batch_fits_and_the_next_does_not(tiny: str) -> None:
    loaded = recipe(tiny, "method=lora")
    room = Room(8 * 2**20, 2 * 2**20)
    record = estimate([("lora", loaded)], Conditions(), room)
    (row,) = record["rows"]
    batch = row["fit"]["batch"]
    rehearsal = rehearsed(loaded)

    def peak(size: int) -> int:
        return int(rehearsal.step(size, LENGTH).report()["peak_bytes"])

    assert batch > SIZE
    assert row["fit"]["peak_bytes"] == peak(batch) <= room.for_tensors < peak(batch + 1)
    assert row["peak_bytes"] == peak(SIZE) == sum(row["categories"].values())
    assert row["categories"]["weights"] == rehearsal.weights_bytes


def test_no_batch_fits_where_one_example_does_not(tiny: str) -> None:
    room = Room(2**19, 2**18)
    (row,) = estimate([("full", recipe(tiny, "method=full"))], Conditions(), room)["rows"]
    assert row["fit"]["batch"] == 0 and row["fit"]["peak_bytes"] > room.for_tensors


def test_a_row_says_what_it_leaves_out_or_what_train_refuses(tiny: str) -> None:
    loaded = recipe(tiny, "method=full", "model.dtype=bfloat16", "train.torch_compile=true")
    own = replace(loaded, recipe=loaded.recipe.model_copy(update={"task": csv_task(loaded)}))
    notes = " ".join(estimate([("full", own)], Conditions())["rows"][0]["notes"])
    for part in ("`train` refuses", "torch_compile", "two classes"):
        assert part in notes


def csv_task(loaded: LoadedRecipe) -> Any:
    return loaded.recipe.task.model_copy(update={"name": "csv"})
