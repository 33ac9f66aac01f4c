"""Hostile tensor files: wrong shapes, dtypes, lengths or values, with matching digests."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.hostile_cases import property_test, scratch_folder
from support.hostile_tensors import Damages, damage_tensors, damaged_files, damages, metadata_texts
from support.hostile_text import json_values, positions
from support.tensor_file_uses import (
    adapter,
    basis_bytes,
    language_model,
    model_folder,
    peft_folder,
    sealed_basis,
    use_adapter,
    use_basis,
)

from sparsegrad_cli.generate.peft_folder import base_of, load_onto
from sparsegrad_cli.methods.peft_folder import TENSORS
from sparsegrad_cli.models.load_model import load_classifier
from sparsegrad_cli.models.pretrained import load_tokenizer
from sparsegrad_cli.recipe.schema import ModelSection
from sparsegrad_cli.recipe.tasks import TaskSpec

TWO = TaskSpec("t", ("text",), "label", ("a", "b"), False, "accuracy", ("accuracy",))


# --- a basis


@property_test(
    "a basis with damaged tensors and matching digests",
    few=25,
    what=damages(),
    said=st.dictionaries(
        st.sampled_from(("targets", "settings", "model", "fingerprint", "format", "x", "digest")),
        metadata_texts(),
        max_size=1,
    ),
)
def test_basis_with_damaged_tensors(what: Damages, said: dict[str, str]) -> None:
    with scratch_folder() as folder:
        path = folder / "basis.safetensors"
        path.write_bytes(basis_bytes())
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata())
        tensors = damage_tensors(load_file(path), what)
        metadata = {k: v for k, v in metadata.items() if k not in ("digest", "check")} | said
        sealed_basis(path, tensors, metadata)
        use_basis(path)


@property_test(
    "a basis file with damaged bytes",
    few=25,
    content=st.deferred(lambda: damaged_files(basis_bytes())),
)
def test_basis_with_damaged_bytes(content: bytes) -> None:
    with scratch_folder() as folder:
        path = folder / "basis.safetensors"
        path.write_bytes(content)
        use_basis(path)


# --- an adapter


@property_test("an adapter with damaged tensors and a matching digest", few=25, what=damages())
def test_adapter_with_damaged_tensors(what: Damages) -> None:
    tensors, settings = adapter()
    with scratch_folder() as folder:
        use_adapter(folder, damage_tensors(tensors, what), settings)


@st.composite
def other_settings(draw: st.DrawFn) -> dict[str, Any]:
    """Draw adapter.json with one or two other values."""
    settings = copy.deepcopy(adapter()[1])
    for _ in range(draw(st.integers(1, 2))):
        container, key = draw(st.sampled_from(list(positions(settings))))
        number = st.sampled_from((0, 1, 2, 5, 8, 16, 40, 64, 10**9))
        names = st.sampled_from(("core", "rotated", "static", "dynamic", "dense", "lora", "rest"))
        container[key] = copy.deepcopy(draw(st.one_of(json_values(), number, names)))
    return settings


@property_test("adapter.json with other values", few=25, settings=st.deferred(other_settings))
def test_adapter_with_damaged_settings(settings: dict[str, Any]) -> None:
    with scratch_folder() as folder:
        use_adapter(folder, adapter()[0], settings)


# --- a PEFT folder


PEFT_KEYS = (
    *("peft_type", "r", "lora_alpha", "target_modules", "base_model_name_or_path", "bias", "x"),
    *("modules_to_save", "rank_pattern", "alpha_pattern", "use_dora", "revision", "task_type"),
    *("megatron_config", "layers_to_transform", "init_lora_weights", "auto_mapping"),
)
PEFT_VALUES = st.one_of(
    json_values(), st.sampled_from((1, 2, 64, "LORA", "IA3", "all", ["up_proj"]))
)


@property_test(
    "a PEFT folder of other tensors or settings",
    few=12,
    many=400,
    what=damages(2),
    changes=st.dictionaries(st.sampled_from(PEFT_KEYS), PEFT_VALUES, max_size=1),
)
def test_a_peft_folder(what: Damages, changes: dict[str, Any]) -> None:
    with scratch_folder() as folder:
        shutil.copytree(peft_folder() / "lora", folder / "lora")
        config = json.loads((folder / "lora" / "adapter_config.json").read_text())
        (folder / "lora" / "adapter_config.json").write_text(json.dumps(config | changes))
        save_file(
            damage_tensors(load_file(folder / "lora" / TENSORS), what), folder / "lora" / TENSORS
        )
        base_of(folder / "lora")
        model: Any = load_onto(copy.deepcopy(language_model()), folder / "lora")
        assert model(torch.tensor([[5, 6, 7]])).logits.shape == (1, 3, 260)


# --- a model folder


CONFIG_KEYS = ("auto_map", "quantization_config", "num_labels", "id2label", "torch_dtype", "dtype")
CODE = "raise SystemExit('run')"
MAPPED = {
    "model_type": "evil",
    "auto_map": {
        "AutoConfig": "evil.Config",
        "AutoModelForSequenceClassification": "evil.Model",
        "AutoTokenizer": ["evil.Tokenizer", None],
    },
}


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    """Draw config.json of a tiny BERT with one or two other values."""
    config: dict[str, Any] = json.loads((model_folder() / "config.json").read_text())
    for _ in range(draw(st.integers(1, 2))):
        key = draw(st.one_of(st.sampled_from(sorted(config)), st.sampled_from(CONFIG_KEYS)))
        config[key] = copy.deepcopy(draw(json_values()))
    return config | draw(st.sampled_from(({}, {}, {}, MAPPED)))


@property_test("a model's config.json with other values", few=10, config=configurations())
def test_model_with_damaged_configuration(config: dict[str, Any]) -> None:
    with scratch_folder() as folder:
        (folder / "base").mkdir()
        shutil.copytree(model_folder(), folder / "base", dirs_exist_ok=True)
        (folder / "base" / "config.json").write_text(json.dumps(config))
        (folder / "base" / "evil.py").write_text(CODE)
        used(folder / "base")


@st.composite
def tokenizers(draw: st.DrawFn) -> tuple[str, str]:
    """Draw (name, content) of a tokenizer file with one or two other values."""
    name = draw(st.sampled_from(("tokenizer.json", "tokenizer_config.json")))
    content = (model_folder() / name).read_text()
    if not draw(st.integers(0, 4)):
        return name, content[: draw(st.integers(0, len(content)))]
    data = json.loads(content)
    for _ in range(draw(st.integers(1, 2))):
        # The hundreds of vocabulary entries are equivalent: change only one.
        there = [place for place in positions(data) if len(place[0]) < 100]
        container, key = draw(st.sampled_from(there))
        if draw(st.integers(0, 3)):
            container[key] = copy.deepcopy(draw(json_values()))
        else:
            del container[key]
    return name, json.dumps(data | draw(st.sampled_from(({}, {}, MAPPED))))


@property_test("a tokenizer's files with other values", few=10, case=tokenizers())
def test_damaged_tokenizer_files(case: tuple[str, str]) -> None:
    with scratch_folder() as folder:
        shutil.copytree(model_folder(), folder / "base")
        (folder / "base" / case[0]).write_text(case[1])
        (folder / "base" / "evil.py").write_text(CODE)
        tokenizer = load_tokenizer(ModelSection(name=str(folder / "base")))
        assert tokenizer("a", truncation=True, max_length=4)["input_ids"] is not None


@property_test(
    "model weights with damaged tensors or bytes",
    few=10,
    weights=st.one_of(damages(2), st.deferred(lambda: damaged_files(model_weights()))),
)
def test_model_with_damaged_weights(weights: Damages | bytes) -> None:
    with scratch_folder() as folder:
        shutil.copytree(model_folder(), folder / "base")
        path = folder / "base" / "model.safetensors"
        if isinstance(weights, bytes):
            path.write_bytes(weights)
        else:
            save_file(damage_tensors(load_file(path), weights), path, {"format": "pt"})
        torch.save({}, folder / "base" / "pytorch_model.bin")
        used(folder / "base")


def model_weights() -> bytes:
    return (model_folder() / "model.safetensors").read_bytes()


def used(base: Path) -> None:
    """Use the model as training and evaluation do."""
    section = ModelSection(name=str(base))
    tokenizer = load_tokenizer(section)
    model = load_classifier(section, TWO, seed=0).model
    inputs = tokenizer(["a b"], truncation=True, max_length=4, return_tensors="pt")
    assert model(**inputs).logits.shape == (1, 2)
