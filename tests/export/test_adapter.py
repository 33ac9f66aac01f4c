"""Exported adapters load without the run, and only onto their base model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.small_runs import (
    answers,
    base_folder,
    base_of,
    by_transformers,
    data_folder,
    tokenizer_of,
    train,
)
from support.tiny_models import batch
from torch import Tensor

from sparsegrad_cli import load_adapter
from sparsegrad_cli.errors import FileFormatError, UsageError
from sparsegrad_cli.export.export_run import export_run
from sparsegrad_cli.export.forms import ExportOptions
from sparsegrad_cli.models.digests import tensors_digest

Runs = Callable[..., Path]

STATIC = ("method.form=core", "method.density=0.05", "method.rank=7")
UP = "bert.encoder.layer.0.intermediate.dense"


@pytest.fixture(scope="session")
def written(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export an adapter."""
    place = tmp_path_factory.mktemp("adapter") / "written"
    export_run(runs(*STATIC), ExportOptions("adapter", place))
    return place


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """Return a copy of the exported adapter, away from its run."""
    return Path(shutil.copytree(written, tmp_path / "adapter"))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors and update the digest, as an attacker would."""
    path = folder / "adapter.safetensors"
    tensors = load_file(path)
    change(tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, path)
    settings = json.loads((folder / "adapter.json").read_text())
    settings["digest"] = tensors_digest(sorted(tensors.items()))
    (folder / "adapter.json").write_text(json.dumps(settings))


def test_adapter_holds_only_values_positions_bases_and_head(folder: Path) -> None:
    tensors = load_file(folder / "adapter.safetensors")
    kinds = {name.partition("/")[0] if "/" in name else name.split(".")[-1] for name in tensors}
    assert kinds == {"values", "support", "basis", "fresh", "weight", "bias"}
    assert tensors[f"{UP}.support"].dtype == torch.int32
    assert tensors[f"basis/q_out/{UP}"].shape == (40, 7)
    assert {p.name for p in folder.iterdir()} == {
        "README.md",
        "adapter.safetensors",
        "adapter.json",
        "export.json",
    }


def test_training_continues_from_a_loaded_adapter(folder: Path) -> None:
    model: Any = load_adapter(folder)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    inputs = batch(seed=3)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_loading_an_adapter_keeps_the_random_state(folder: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_adapter(folder)
    assert torch.equal(torch.rand(3), expected)


def test_adapter_loads_only_onto_its_base_model(folder: Path, runs: Runs, tmp_path: Path) -> None:
    base = base_of(runs(*STATIC))
    model = by_transformers(base, num_labels=2)
    with torch.no_grad():
        model.get_parameter(f"{UP}.weight").view(-1)[0] += 1.0
    with pytest.raises(UsageError, match="other weights"):
        load_adapter(folder, model)
    with pytest.raises(UsageError, match="other weights"):
        load_adapter(folder, by_transformers(base, num_labels=2, dtype=torch.bfloat16))
    with pytest.raises(UsageError, match="no plain linear layer"):
        load_adapter(folder, by_transformers(base_folder(tmp_path / "gpt2", "gpt2"), num_labels=2))
    with pytest.raises(UsageError, match="no plain linear layer"):
        load_adapter(folder, load_adapter(folder))
    with pytest.raises(UsageError, match="expected a model with 2 labels, got 3"):
        load_adapter(folder, by_transformers(base, num_labels=3))


def test_damaged_adapter_is_refused(folder: Path) -> None:
    path = folder / "adapter.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 0xFF
    path.write_bytes(bytes(content))
    with pytest.raises(FileFormatError, match="digest of the tensors differs"):
        load_adapter(folder)
    path.write_bytes(bytes(content[:1000]))
    with pytest.raises(FileFormatError, match="cannot be read"):
        load_adapter(folder)
    path.unlink()
    with pytest.raises(FileFormatError, match="cannot be read"):
        load_adapter(folder)
    shutil.rmtree(folder)
    with pytest.raises(FileFormatError, match="cannot read the adapter"):
        load_adapter(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", "sparsegrad-adapter-9"),
        ("scope", "everything"),
        ("digest", None),
        ("targets", []),
        ("targets", [{"name": UP}]),
        ("method", {"name": "sparsegrad", "form": "core", "rank": -1}),
        ("method", {"name": "os.system"}),
        ("keys", {UP: 3}),
        ("trust_remote_code", True),
    ],
)
def test_invalid_adapter_settings_are_refused(folder: Path, key: str, value: Any) -> None:
    path = folder / "adapter.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(FileFormatError, match="not an adapter\\.json of this"):
        load_adapter(folder)
    for text in ("", "[]", "null", "{", "\udc80"):
        path.write_text(text, errors="surrogateescape")
        with pytest.raises(FileFormatError, match="not an adapter\\.json of this"):
            load_adapter(folder)


def test_unknown_auto_class_is_refused(folder: Path) -> None:
    """The file names the class to load, which must be one that an export writes."""
    path = folder / "adapter.json"
    settings = json.loads(path.read_text())
    settings["model"]["auto_class"] = "pipeline"
    path.write_text(json.dumps(settings))
    with pytest.raises(FileFormatError, match=r"model.auto_class"):
        load_adapter(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t[f"{UP}.support"].__setitem__(0, -7), "outside its 49 entries"),
        (lambda t: t[f"{UP}.support"].__setitem__(-1, 49), "outside its 49 entries"),
        (lambda t: t.pop(f"{UP}.support"), "support is missing|shape of"),
        (lambda t: t.pop(f"basis/q_in/{UP}"), "basis/q_in"),
        (lambda t: t.update({f"basis/q_in/{UP}": torch.zeros(3, 2)}), r"shape \(3, 2\)"),
        (lambda t: t.update({f"basis/q_in/{UP}": torch.zeros(16)}), r"shape \(16,\)"),
        (lambda t: t[f"basis/q_out/{UP}"].fill_(float("inf")), "not finite"),
        (lambda t: t[f"{UP}.values"].fill_(float("nan")), "not finite"),
        (lambda t: t.update({"fresh/no.such": torch.zeros(1)}), "no"),
        (lambda t: t.update({"fresh/bert.pooler.dense.weight": torch.zeros(3)}), "size"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(3)}), "does not belong"),
    ],
)
def test_hostile_tensors_are_refused(
    folder: Path, change: Callable[[dict[str, Tensor]], Any], says: str
) -> None:
    rewrite(folder, change)
    with pytest.raises(FileFormatError, match=says):
        load_adapter(folder)


def test_rewritten_adapter_loads_without_a_change(folder: Path, runs: Runs) -> None:
    """The helper above does not damage anything by itself."""
    expected = answers(load_adapter(folder), tokenizer_of(runs(*STATIC)))[0]
    rewrite(folder, lambda tensors: None)
    assert torch.equal(answers(load_adapter(folder), tokenizer_of(runs(*STATIC)))[0], expected)


def test_base_model_of_a_relative_path_is_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftConfig

    monkeypatch.chdir(tmp_path)
    base = base_folder(Path("base")).resolve()
    run = train(Path("run"), Path("base"), data_folder(Path("data")), *STATIC, "train.max_steps=1")
    for form in ("adapter", "lora"):
        export_run(run, ExportOptions(form, Path(form)))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_adapter(tmp_path / "adapter") is not None
    assert PeftConfig.from_pretrained(tmp_path / "lora").base_model_name_or_path == str(base)
