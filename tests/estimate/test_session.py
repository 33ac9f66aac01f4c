"""Rows of an estimate: the largest batch, assumptions, and the source of a configuration."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.chat_tokenizers import smollm2_tokenizer

from sparsegrad_cli.errors import DownloadError
from sparsegrad_cli.estimate.estimate_steps import Room, estimate_steps
from sparsegrad_cli.estimate.fake_run import Conditions, FakeRun
from sparsegrad_cli.models.architectures import configuration_of
from sparsegrad_cli.models.pretrained import load_configuration
from sparsegrad_cli.recipe.load_recipe import LoadedRecipe, load_recipe
from sparsegrad_cli.recipe.schema import ModelSection

SIZE, LENGTH = 2, 32
TINY = {
    "model_type": "bert",
    "vocab_size": 1000,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": LENGTH,
}


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    """Return a model folder with a configuration and no weights."""
    (tmp_path / "config.json").write_text(json.dumps(TINY), encoding="utf-8")
    return f"model={tmp_path}"


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def recipe(*overrides: str) -> LoadedRecipe:
    shapes = (f"task.max_length={LENGTH}", f"train.per_device_train_batch_size={SIZE}")
    return load_recipe(None, (*shapes, *overrides))


def row(loaded: LoadedRecipe, room: Room | None = None) -> dict[str, Any]:
    (found,) = estimate_steps([("it", loaded)], Conditions(), room).rows
    return found.to_json()


def at(loaded: LoadedRecipe, size: int) -> int:
    """Return the peak at another batch size."""
    train = loaded.recipe.train.model_copy(update={"per_device_train_batch_size": size})
    other = replace(loaded, recipe=loaded.recipe.model_copy(update={"train": train}))
    return int(row(other)["peak_bytes"])


@pytest.mark.parametrize("accumulated", [1, 4])
def test_the_largest_batch_fits_and_the_next_does_not(tiny: str, accumulated: int) -> None:
    loaded = recipe(tiny, "method=lora", f"train.gradient_accumulation_steps={accumulated}")
    room = Room(4 * 2**20, 2**20)
    found = row(loaded, room)
    batch = found["fit"]["batch"]
    assert batch > SIZE
    assert found["fit"]["peak_bytes"] == at(loaded, batch) <= room.for_tensors
    assert at(loaded, batch + 1) > room.for_tensors
    assert found["peak_bytes"] == at(loaded, SIZE) == sum(found["categories"].values())


CORE = ("method.rank=8", "calibration.warmup_steps=1")


@pytest.mark.parametrize("limit", ["step", "calibration"])
def test_step_and_calibration_both_fit_and_the_limiting_one_is_named(
    tiny: str, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, room = recipe(tiny, *CORE), Room(4 * 2**20, 2**20)
    if limit == "calibration":  # of a model that needs twice as much there
        theirs = FakeRun.calibration

        def twice(self: FakeRun, size: int) -> Any:
            peak = theirs(self, size)
            assert peak is not None
            return replace(peak, peak_bytes=2 * peak.peak_bytes)

        monkeypatch.setattr(FakeRun, "calibration", twice)
    found = row(loaded, room)
    batch = found["fit"]["batch"]
    assert batch > SIZE and found["fit"]["limited_by"] == limit

    def peaks(size: int) -> tuple[int, int]:
        train = loaded.recipe.train.model_copy(update={"per_device_train_batch_size": size})
        other = replace(loaded, recipe=loaded.recipe.model_copy(update={"train": train}))
        one = row(other)
        return int(one["peak_bytes"]), int(one["calibrate_peak_bytes"])

    assert found["fit"]["peak_bytes"] == max(peaks(batch)) <= room.for_tensors
    step, calibration = peaks(batch + 1)
    assert (step if limit == "step" else calibration) > room.for_tensors
    assert limit == "step" or step <= room.for_tensors


def test_no_batch_fits_if_calibration_does_not(tiny: str) -> None:
    loaded = recipe(tiny, *CORE, "calibration.batch_size=512")
    found = row(loaded, Room(4 * 2**20, 2**20))
    assert found["calibrate_batch"] == 512
    assert found["fit"]["batch"] == 0 and found["fit"]["limited_by"] == "calibration"


def test_calibration_recomputes_blocks_and_autocasts_as_the_step_does(tmp_path: Path) -> None:
    deep = TINY | {"num_hidden_layers": 8}
    (tmp_path / "config.json").write_text(json.dumps(deep), encoding="utf-8")
    large = (f"model={tmp_path}", *CORE, "calibration.batch_size=32")
    plain, recomputed, half = (
        row(recipe(*large, *more))["calibrate_peak_bytes"]
        for more in ((), ("train.gradient_checkpointing=true",), ("train.bf16=true",))
    )
    assert recomputed < 0.6 * plain
    assert half < 0.8 * plain


def test_no_batch_fits_if_one_example_does_not(tiny: str) -> None:
    room = Room(2**18, 2**17)
    found = row(recipe(tiny, "method=full"), room)
    assert found["fit"]["batch"] == 0 and found["fit"]["peak_bytes"] > room.for_tensors


def test_settings_left_out_are_noted(tiny: str) -> None:
    loaded = recipe(tiny, "method=full", "train.torch_compile=true")
    own = loaded.recipe.task.model_copy(update={"name": "csv"})
    notes = " ".join(
        row(replace(loaded, recipe=loaded.recipe.model_copy(update={"task": own})))["notes"]
    )
    assert "torch_compile" in notes and "two classes" in notes


@pytest.mark.parametrize(("dtype", "switch"), [("bfloat16", "bf16"), ("float16", "fp16")])
def test_autocast_is_assumed_where_training_needs_it(tiny: str, dtype: str, switch: str) -> None:
    half = (tiny, f"model.dtype={dtype}")
    supposed = row(recipe(*half, "method=full"))
    assert supposed["autocast"] == dtype and switch in " ".join(supposed["notes"])
    asked = row(recipe(*half, "method=full", f"train.{switch}=true"))
    assert asked["phases"] == supposed["phases"] and not asked["notes"]
    assert row(recipe(*half, "method=lora"))["autocast"] is None  # W stays as it is
    # The targets are float32 then, which is counted as what the method adds.
    targets = 2 * 32 * 64
    head = 32 * 2 + 2
    assert supposed["categories"]["adapter"] == 2 * (targets + head)


# --- where a configuration comes from


PUBLISHED = {
    "bert-base-uncased": 109_482_240,
    "roberta-base": 124_645_632,
    "roberta-large": 355_359_744,
    "builtin:mpnet": 109_486_464,
    "builtin:smollm2": 134_515_008,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mirror/Mistral-7B-v0.1": 7_241_732_096,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_known_architectures_have_the_published_number_of_parameters(name: str) -> None:
    from transformers import AutoModel, AutoModelForCausalLM

    config, source = configuration_of(ModelSection(name=name))
    assert "built-in" in source and ("out of reach" in source) == name.startswith("mirror")
    loader = AutoModelForCausalLM if config.model_type in ("llama", "mistral") else AutoModel
    with torch.device("meta"):
        model = loader.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


def test_builtin_language_model_has_the_sizes_of_its_files() -> None:
    smollm2_tokenizer()  # or skip
    section = ModelSection(name="builtin:smollm2")
    known, own = configuration_of(section)[0], load_configuration(section)
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"):
        assert getattr(known, name) == getattr(own, name)
    for name in ("num_attention_heads", "num_key_value_heads", "max_position_embeddings"):
        assert getattr(known, name) == getattr(own, name)
    assert known.tie_word_embeddings == own.tie_word_embeddings


def test_model_folder_of_any_name_is_read(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`model: roberta-base` means the folder of that name if it exists."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "roberta-base").mkdir()
    (tmp_path / "roberta-base" / "config.json").write_text(json.dumps(TINY), encoding="utf-8")
    config, source = configuration_of(ModelSection(name="roberta-base"))
    assert config.hidden_size == 32 and source == "its local config.json"


def test_unknown_model_is_one_clear_error() -> None:
    with pytest.raises(DownloadError, match="nobody/nothing") as error:
        configuration_of(ModelSection(name="nobody/nothing"))
    assert error.value.fix is not None and "Llama-2-7b-hf" in error.value.fix
    with pytest.raises(DownloadError):  # another revision may be another model
        configuration_of(ModelSection(name="bert-base-multilingual", revision="old"))
