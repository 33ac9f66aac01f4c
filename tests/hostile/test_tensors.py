"""Tensor files that mean harm: of another shape, dtype, length or sense, with digests that fit."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from evil import places, values
from hostility import holds, scratch
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from talkers import load, talker
from tiny import batch, calibrated, classifier, logits, targets_of
from torch import Tensor, nn
from torn_tensors import Spoils, spoil, spoils, texts, torn

from sparsegrad_cli.export.adapter import load_adapter
from sparsegrad_cli.export.adapter_file import tensors_digest as adapter_digest
from sparsegrad_cli.generate.peft_folder import TENSORS, base_of, on_base
from sparsegrad_cli.methods.table import make_method
from sparsegrad_cli.modeling.targets import fingerprint
from sparsegrad_cli.numerics.hosvd import Basis, truncated
from sparsegrad_cli.recipe.method_section import SparsegradMethod
from sparsegrad_cli.training.basis_file import (
    BasisFile,
    check_belongs,
    check_rank,
    read_basis,
    tensors_digest,
    write_basis,
)

SCORED = SparsegradMethod(name="sparsegrad", density=0.05, form="core", rank=7)
PARTS = ("q_out", "q_in", "singular_out", "singular_in")


# --- a basis


@functools.cache
def basis_bytes() -> bytes:
    """A basis with scores, of the tiny model below."""
    model = base()
    targets = targets_of(model)
    found = calibrated(model, targets, steps=2, basis_per="kind", score="square", rank=7)
    settings = {"steps": 2, "seconds": 0.5}
    bases = {key: truncated(basis, 7) for key, basis in found.bases.items()}
    digest = tensors_digest(bases, found.scores)
    mark = fingerprint(model, targets)
    made = BasisFile(bases, found.keys, "m", mark, settings, "d", digest, found.scores)
    with tempfile.TemporaryDirectory() as folder:
        write_basis(Path(folder) / "b", made)
        return (Path(folder) / "b").read_bytes()


def base() -> nn.Module:
    return copy.deepcopy(_base())


@functools.cache
def _base() -> nn.Module:
    return classifier()


def use_basis(path: Path) -> None:
    """As training does with calibration.basis; what is accepted computes."""
    model = base()
    targets = targets_of(model)
    found = read_basis(path)
    check_belongs(found, targets, fingerprint(model, targets), "calibration.basis")
    check_rank(found, SCORED.rank, "calibration.basis")
    before = logits(model)
    method = make_method(SCORED)
    method.prepare(model, targets, scope="head", bases=found.by_target(), scores=found.scores)
    assert torch.equal(logits(model), before)
    assert torch.isfinite(torch.tensor(float(found.settings.get("seconds") or 0.0)))


def sealed_basis(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a basis as one who means harm would: with digests that fit."""
    scores = {n.removeprefix("score/"): t for n, t in tensors.items() if n.startswith("score/")}
    keys = {name.partition("/")[2] for name in tensors if name.startswith("q_out/")}
    whole = [key for key in keys if all(f"{part}/{key}" in tensors for part in PARTS)]
    bases = {key: Basis(*(tensors[f"{part}/{key}"] for part in PARTS)) for key in whole}
    metadata = {"digest": tensors_digest(bases, scores), **metadata}
    text = json.dumps(metadata, sort_keys=True)
    save_file(tensors, path, {**metadata, "check": hashlib.sha256(text.encode()).hexdigest()})


@holds(
    "a basis of other tensors, its digests fitting",
    few=40,
    what=spoils(),
    said=st.dictionaries(
        st.sampled_from(("targets", "settings", "model", "fingerprint", "format", "x", "digest")),
        texts(),
        max_size=1,
    ),
)
def test_a_basis_of_other_tensors(what: Spoils, said: dict[str, str]) -> None:
    with scratch() as folder:
        path = folder / "basis.safetensors"
        path.write_bytes(basis_bytes())
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata())
        tensors = spoil(load_file(path), what)
        metadata = {k: v for k, v in metadata.items() if k not in ("digest", "check")} | said
        sealed_basis(path, tensors, metadata)
        use_basis(path)


@holds(
    "a basis file whose bytes are torn", few=40, content=st.deferred(lambda: torn(basis_bytes()))
)
def test_a_torn_basis(content: bytes) -> None:
    with scratch() as folder:
        path = folder / "basis.safetensors"
        path.write_bytes(content)
        use_basis(path)


# --- an adapter


@functools.cache
def adapter() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, settings) of an adapter of the tiny model, as an export writes them."""
    model = base()
    targets = targets_of(model)
    found = calibrated(model, targets, steps=2, rank=7)
    method = make_method(SCORED)
    method.prepare(model, targets, scope="head", bases=found.by_target())
    tensors = dict(method.adapter_tensors(model))
    tensors |= {f"basis/{p}/{k}": getattr(b, p) for k, b in found.bases.items() for p in PARTS}
    about = {
        "name": "tiny",
        "revision": None,
        "dtype": "float32",
        "auto_class": "AutoModelForSequenceClassification",
        "fingerprint": fingerprint(_base(), targets),
        "num_labels": 2,
        "id2label": {"0": "a", "1": "b"},
        "problem_type": None,
        "pad_token_id": 0,
    }
    settings = {
        "format": "sparsegrad-adapter-1",
        "model": about,
        "method": SCORED.model_dump(mode="json"),
        "scope": "head",
        "seed": 1,
        "targets": [vars(target) for target in targets],
        "keys": dict(found.keys),
    }
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}, settings


def use_adapter(folder: Path, tensors: dict[str, Tensor], settings: dict[str, Any]) -> None:
    """As anyone loads an adapter; what is accepted computes."""
    save_file(tensors, folder / "adapter.safetensors")
    settings = {"digest": adapter_digest(tensors), **settings}
    (folder / "adapter.json").write_text(json.dumps(settings))
    assert load_adapter(folder, base())(**batch()).logits.shape == (8, 2)


@holds("an adapter of other tensors, its digest fitting", few=40, what=spoils())
def test_an_adapter_of_other_tensors(what: Spoils) -> None:
    tensors, settings = adapter()
    with scratch() as folder:
        use_adapter(folder, spoil(tensors, what), settings)


@st.composite
def other_settings(draw: st.DrawFn) -> dict[str, Any]:
    """adapter.json with one or two values that are not its own."""
    settings = copy.deepcopy(adapter()[1])
    for _ in range(draw(st.integers(1, 2))):
        container, key = draw(st.sampled_from(list(places(settings))))
        number = st.sampled_from((0, 1, 2, 5, 8, 16, 40, 64, 10**9))
        names = st.sampled_from(("core", "rotated", "static", "dynamic", "dense", "lora", "rest"))
        container[key] = draw(st.one_of(values(), number, names))
    return settings


@holds("adapter.json with other values", few=40, settings=st.deferred(other_settings))
def test_an_adapter_of_other_settings(settings: dict[str, Any]) -> None:
    with scratch() as folder:
        use_adapter(folder, adapter()[0], settings)


# --- a folder of peft's


@functools.cache
def peft_folder() -> Path:
    """A LoRA folder of a tiny language model, by peft itself."""
    from peft import LoraConfig, get_peft_model

    folder = Path(tempfile.mkdtemp())
    model = load(talker(folder / "base"))[0]
    wrapped: Any = get_peft_model(model, LoraConfig(r=2, target_modules=["up_proj", "down_proj"]))
    wrapped.save_pretrained(folder / "lora")
    return folder


@functools.cache
def language_model() -> nn.Module:
    model: nn.Module = load(peft_folder() / "base")[0]
    return model


PEFT_KEYS = (
    *("peft_type", "r", "lora_alpha", "target_modules", "base_model_name_or_path", "bias", "x"),
    *("modules_to_save", "rank_pattern", "alpha_pattern", "use_dora", "revision", "task_type"),
    *("megatron_config", "layers_to_transform", "init_lora_weights", "auto_mapping"),
)
PEFT_VALUES = st.one_of(values(), st.sampled_from((1, 2, 64, "LORA", "IA3", "all", ["up_proj"])))


@holds(
    "a PEFT folder of other tensors or settings",
    few=12,
    many=600,
    what=spoils(2),
    changes=st.dictionaries(st.sampled_from(PEFT_KEYS), PEFT_VALUES, max_size=1),
)
def test_a_peft_folder(what: Spoils, changes: dict[str, Any]) -> None:
    with scratch() as folder:
        shutil.copytree(peft_folder() / "lora", folder / "lora")
        config = json.loads((folder / "lora" / "adapter_config.json").read_text())
        (folder / "lora" / "adapter_config.json").write_text(json.dumps(config | changes))
        save_file(spoil(load_file(folder / "lora" / TENSORS), what), folder / "lora" / TENSORS)
        base_of(folder / "lora")
        model: Any = on_base(copy.deepcopy(language_model()), folder / "lora")
        assert model(torch.tensor([[5, 6, 7]])).logits.shape == (1, 3, 260)
