"""Valid tensor files of every kind, and functions that use one as its command does."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sparsegrad_cli.calibration.basis_file import (
    BasisFile,
    basis_digest,
    check_belongs,
    check_rank,
    read_basis,
    write_basis,
)
from sparsegrad_cli.methods.sparsegrad.settings import SparsegradSettings
from sparsegrad_cli.models.digests import fingerprint, tensors_digest
from sparsegrad_cli.numerics.hosvd import Basis, truncated
from sparsegrad_cli.records.basis import BasisMetadata
from sparsegrad_cli.records.run import CalibrationSettings
from sparsegrad_cli.restore.exported_adapter import load_adapter
from support.chat_models import chat_model_folder, load
from support.small_runs import base_folder
from support.tiny_models import batch, calibrated, classifier, logits, targets_of

RANK = 7
METHOD = SparsegradSettings(name="sparsegrad", density=0.05, form="core", rank=RANK)
PARTS = ("q_out", "q_in", "singular_out", "singular_in")


@functools.cache
def basis_bytes() -> bytes:
    """Return the bytes of a basis file with scores, for the tiny model below."""
    model = base()
    targets = targets_of(model)
    found = calibrated(model, targets, steps=2, basis_per="kind", score="square", rank=7)
    settings = CalibrationSettings(steps=2, seconds=0.5)
    bases = {key: truncated(basis, 7) for key, basis in found.bases.items()}
    digest = basis_digest(bases, found.scores)
    mark = fingerprint(model, targets)
    about = BasisMetadata(
        model="m",
        fingerprint=mark,
        targets=found.keys,
        settings=settings,
        recipe_digest="d",
        digest=digest,
    )
    made = BasisFile(bases, about, found.scores)
    with tempfile.TemporaryDirectory() as folder:
        write_basis(Path(folder) / "b", made)
        return (Path(folder) / "b").read_bytes()


def base() -> nn.Module:
    return copy.deepcopy(_base())


@functools.cache
def _base() -> nn.Module:
    return classifier()


def use_basis(path: Path) -> None:
    """Use a basis file as training does, and check that an accepted one computes."""
    model = base()
    targets = targets_of(model)
    found = read_basis(path)
    check_belongs(found, targets, fingerprint(model, targets), "calibration.basis")
    check_rank(found, RANK, "calibration.basis")
    before = logits(model)
    method = METHOD.implementation()
    method.prepare(model, targets, scope="head", bases=found.by_target(), scores=found.scores)
    assert torch.equal(logits(model), before)
    assert torch.isfinite(torch.tensor(float(found.metadata.settings.seconds or 0.0)))


def sealed_basis(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a basis file with matching digests, as an attacker would."""
    scores = {n.removeprefix("score/"): t for n, t in tensors.items() if n.startswith("score/")}
    keys = {name.partition("/")[2] for name in tensors if name.startswith("q_out/")}
    whole = [key for key in keys if all(f"{part}/{key}" in tensors for part in PARTS)]
    bases = {key: Basis(*(tensors[f"{part}/{key}"] for part in PARTS)) for key in whole}
    metadata = {"digest": basis_digest(bases, scores), **metadata}
    text = json.dumps(metadata, sort_keys=True)
    save_file(tensors, path, {**metadata, "check": hashlib.sha256(text.encode()).hexdigest()})


@functools.cache
def adapter() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return (tensors, settings) of an adapter of the tiny model, as an export writes them."""
    model = base()
    targets = targets_of(model)
    found = calibrated(model, targets, steps=2, rank=7)
    method = METHOD.implementation()
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
        "method": METHOD.model_dump(mode="json"),
        "scope": "head",
        "seed": 1,
        "targets": [vars(target) for target in targets],
        "keys": dict(found.keys),
    }
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}, settings


def use_adapter(folder: Path, tensors: dict[str, Tensor], settings: dict[str, Any]) -> None:
    """Load an adapter, and check that an accepted one computes."""
    save_file(tensors, folder / "adapter.safetensors")
    settings = {"digest": tensors_digest(sorted(tensors.items())), **settings}
    (folder / "adapter.json").write_text(json.dumps(settings))
    assert load_adapter(folder, base())(**batch()).logits.shape == (8, 2)


@functools.cache
def peft_folder() -> Path:
    """Return a LoRA folder of a tiny language model, written by peft."""
    from peft import LoraConfig, get_peft_model

    folder = Path(tempfile.mkdtemp())
    model = load(chat_model_folder(folder / "base"))[0]
    wrapped: Any = get_peft_model(model, LoraConfig(r=2, target_modules=["up_proj", "down_proj"]))
    wrapped.save_pretrained(folder / "lora")
    return folder


@functools.cache
def language_model() -> nn.Module:
    model: nn.Module = load(peft_folder() / "base")[0]
    return model


@functools.cache
def model_folder() -> Path:
    return base_folder(Path(tempfile.mkdtemp()) / "base")
